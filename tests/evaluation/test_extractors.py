from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import Dinov2Config, Dinov2Model

from evaluation.extractors import EXTRACTORS, ClipModel, Extractor, full_precision, open_clip_model, open_extractor
from evaluation.extractors import clip as clip_module
from evaluation.extractors.clip import ARCHITECTURES, load_clip_folder
from evaluation.extractors.digit_features import load_digit_features
from evaluation.extractors.dinov2 import dinov2_network, position_embedding, prepare
from evaluation.extractors.inception import clean_resize
from evaluation.weights import PUBLISHED, PublishedFile
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import sha256_of_files
from fdistill.base.images import to_unit
from fdistill.data.digit_captions import load_digit_images
from fdistill.data.digits import load_digits
from support.dinov2 import published_dinov2
from support.inception import images

CPU = torch.device("cpu")


# --- Inception


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> Extractor:
    return open_extractor("inception", CPU, {"": inception_file.parent})


@pytest.fixture(scope="module")
def fidelity(inception_file: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's own call."""
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )


@pytest.mark.parametrize("size", [32, 64, 299])
def test_inception_is_torch_fidelitys_bit_by_bit(
    size: int, inception: Extractor, fidelity: FeatureExtractorInceptionV3
) -> None:
    batch = images(2, size)
    pool, logits = fidelity(batch)
    ours = inception.run(batch)
    assert torch.equal(ours["pool"], pool)
    assert torch.equal(ours["logits"], logits)
    assert (pool[0] - pool[1]).abs().mean() > 0.01 * pool.abs().mean()  # features depend on the image
    assert {name: rows.shape[1] for name, rows in ours.items()} == inception.outputs
    assert {rows.dtype for rows in ours.values()} == {torch.float32}


def test_inception_from_safetensors_is_the_same(
    inception_file: Path, fidelity: FeatureExtractorInceptionV3, tmp_path: Path
) -> None:
    save_file(torch.load(inception_file), tmp_path / "converted.safetensors")
    ours = open_extractor("inception", CPU, {"inception": tmp_path / "converted.safetensors"}).run(images(2, 48, 32))
    pool, logits = fidelity(images(2, 48, 32))
    assert torch.equal(ours["pool"], pool)
    assert torch.equal(ours["logits"], logits)


def test_other_weights_are_marked_as_not_published(inception: Extractor, inception_file: Path) -> None:
    assert inception.sha256 == sha256_of_files([inception_file])
    assert not inception.published


def test_weights_of_another_network_are_refused(inception_file: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name, key in (("inception", "inception"), ("inception-clean", "inception"), ("dinov2", "dinov2")):
        with pytest.raises(CheckpointError, match=r"other\.pth: is no"):
            open_extractor(name, CPU, {key: tmp_path / "other.pth"})
    with pytest.raises(CheckpointError, match="is no DINOv2"):
        open_extractor("dinov2", CPU, {"dinov2": inception_file})


@pytest.mark.parametrize(("height", "width"), [(32, 32), (400, 310), (299, 150)])
def test_clean_resizing_is_bicubic_antialiased_and_not_rounded(height: int, width: int) -> None:
    """Against torch's antialiased bicubic filter, which has PIL's kernel."""
    batch = images(2, height, width)
    resized = clean_resize(batch)
    expected = F.interpolate(batch.double(), (299, 299), mode="bicubic", antialias=True)
    assert resized.shape == (2, 3, 299, 299)
    assert resized.dtype == torch.float32
    assert (resized - expected.clamp(0, 255)).abs().max() < 2e-3
    assert (resized - resized.round()).abs().mean() > 0.05
    assert expected.min() < 0  # so that clipping was seen


@pytest.mark.thorough
def test_clean_inception_differs_in_its_resizing_alone(inception_file: Path, inception: Extractor) -> None:
    clean = open_extractor("inception-clean", CPU, {"": inception_file.parent})
    batch = images(2, 299)
    for name, rows in inception.run(batch).items():
        assert torch.equal(clean.run(batch)[name], rows)
    small = images(2, 32)
    ours, other = clean.run(small)["pool"], inception.run(small)["pool"]
    assert (ours - other).abs().mean() > 0.05 * other.abs().mean()
    assert clean.outputs == inception.outputs


def test_features_are_of_their_image_whatever_the_batch(inception: Extractor) -> None:
    batch = images(3, 32)
    together = inception.run(batch)["pool"]
    alone = torch.cat([inception.run(image[None])["pool"] for image in batch.flip(0)]).flip(0)
    assert torch.allclose(together, alone, atol=1e-5)


# --- all of them


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 32, 32).byte(), torch.zeros(3, 32, 32).byte(), images(0, 32)],
    ids=["float", "greyscale", "one image", "no image"],
)
def test_images_of_another_form_are_refused(wrong: Tensor, inception: Extractor) -> None:
    with pytest.raises(ArgumentError, match=r"expected uint8 \[B, 3, H, W\], got torch"):
        inception.run(wrong)


def test_an_unknown_extractor_says_so() -> None:
    with pytest.raises(ArgumentError, match="did you mean 'inception'"):
        open_extractor("incepton", CPU, {})
    with pytest.raises(ArgumentError, match="did you mean 'clip-b32'"):
        open_clip_model("clip-b23", CPU, {})


@pytest.mark.parametrize("name", ["inception", "inception-clean", "dinov2", "clip-b32", "clip-l14", "clip-g14"])
def test_without_weights_the_error_says_which_file_to_get(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = PUBLISHED[name.removesuffix("-clean")]
    with pytest.raises(CheckpointError) as caught:
        open_extractor(name, CPU, {})
    assert file.url in str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / file.name) in str(caught.value)


def test_full_precision_holds_inside_and_leaves_no_trace() -> None:
    def settings() -> list[object]:
        backends: Any = torch.backends
        if hasattr(backends.cudnn, "conv"):
            return [part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]
        return [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]

    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        before = settings()
        with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
            assert (torch.eye(2) @ torch.eye(2)).dtype == torch.float32
            assert set(settings()) <= {"ieee", False}
        assert settings() == before
        assert set(before) & {"tf32", True}
    finally:
        torch.set_float32_matmul_precision(chosen)


# --- digits


def test_digits_are_the_embedded_networks() -> None:
    digits, labels = load_digits()
    extractor = open_extractor("digits", CPU, {})
    rows = extractor.run(digits[:300])
    features, logits = load_digit_features()(to_unit(digits[:300]))
    assert torch.equal(rows["features"], features)
    assert torch.equal(rows["logits"], logits)
    assert (rows["logits"].argmax(1) == labels[:300]).float().mean() > 0.98
    assert extractor.published
    with pytest.raises(ArgumentError, match=r"expected uint8 \[B, 1, 8, 8\]"):
        extractor.run(images(2, 16))


def test_captioned_digits_are_read_by_the_same_network() -> None:
    pictures, labels, _ = load_digit_images()
    extractor = open_extractor("digits-captioned", CPU, {})
    pictures = pictures[:300] // 12 * 12  # so that means of 2x2 pixels and three colours are whole numbers
    pictures[:, 0] = pictures[:, 0] // 24 * 12
    rows = extractor.run(pictures)
    means = pictures.double().reshape(300, 3, 8, 2, 8, 2).mean((1, 3, 5))[:, None]
    assert torch.allclose(rows["features"], load_digit_features()(to_unit(means))[0], atol=1e-5)
    assert {name: value.shape[1] for name, value in rows.items()} == extractor.outputs
    assert extractor.outputs == {"features": 64, "logits": 10, "ink": 1}
    assert torch.allclose(rows["ink"][:, 0], pictures.double().mean((1, 2, 3)).float() / 255)
    assert (rows["logits"].argmax(1) == labels[:300]).float().mean() > 0.98


# --- DINOv2


def as_transformers(state: dict[str, Tensor], position: Tensor) -> dict[str, Tensor]:
    """Published names -> those of transformers' Dinov2Model."""
    names = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.position_embeddings": position,
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    renamed = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        old, new = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for theirs, name in renamed.items():
                names[f"{new}.{name}.{kind}"] = state[f"{old}.{theirs}.{kind}"]
            parts = state[f"{old}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip(("query", "key", "value"), parts, strict=True):
                names[f"{new}.attention.attention.{part}.{kind}"] = value
        for j in (1, 2):
            names[f"{new}.layer_scale{j}.lambda1"] = state[f"{old}.ls{j}.gamma"]
    return names


def test_dinov2_is_the_model_of_transformers(tmp_path: Path) -> None:
    state = published_dinov2()
    network, width = dinov2_network(state)
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14, mlp_ratio=4
    )
    config.save_pretrained(tmp_path)
    renamed = as_transformers(state, position_embedding(state["pos_embed"], 16))
    save_file({name: value.contiguous() for name, value in renamed.items()}, tmp_path / "model.safetensors")
    reference = Dinov2Model.from_pretrained(tmp_path).eval()
    x = prepare(images(2, 50, 40))
    with torch.no_grad():
        expected = reference(x).last_hidden_state[:, 0]
    assert width == 128
    assert torch.allclose(network(x), expected, atol=1e-5)
    assert expected.std() > 0.1


def test_position_embeddings_are_scaled_as_published() -> None:
    """Bicubic by its definition (Keys 1981, a = -0.75) at (i + 0.5) 37 / 16.1 - 0.5, which no other scale gives."""
    published = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def keys(distance: Any) -> Any:
        d, a = np.abs(distance), -0.75
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0))

    matrix = np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, min(max(tap, 0), 36)] += keys(at - tap)
    grid = published[0, 1:].reshape(37, 37, 3).numpy()
    expected = np.einsum("ia,jb,abd->ijd", matrix, matrix, grid).reshape(256, 3)
    scaled = position_embedding(published, 16)
    assert scaled.shape == (1, 257, 3)
    assert torch.equal(scaled[:, 0], published[:, 0])
    assert np.abs(scaled[0, 1:].numpy() - expected).max() < 1e-9


def test_dinov2_sees_images_resized_with_antialiasing_and_normalised() -> None:
    """Against PIL's bicubic filter in float32 and torchvision's constants."""
    batch = images(1, 300, 260)
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in batch[0]]
    resized = np.stack([np.asarray(channel.resize((224, 224), Image.Resampling.BICUBIC)) for channel in channels])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (resized / 255 - mean[:, None, None]) / std[:, None, None]
    assert np.abs(prepare(batch)[0].numpy() - expected).max() < 1e-4


def test_dinov2_reads_its_file(tmp_path: Path) -> None:
    state = published_dinov2()
    torch.save(state, tmp_path / "small.pth")
    extractor = open_extractor("dinov2", CPU, {"dinov2": tmp_path / "small.pth"})
    batch = images(2, 32)
    assert extractor.outputs == {"cls": 128}
    assert torch.equal(extractor.run(batch)["cls"], dinov2_network(state)[0](prepare(batch)))
    assert not extractor.published


# --- CLIP

TINY = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as open_clip writes it, with seeded random weights; its architecture is known as tiny-quickgelu."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    for value in model.parameters():
        value.data += 0.05 * torch.randn_like(value)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocessing = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    config = {"model_cfg": TINY, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tiny-quickgelu.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-quickgelu.json")
    return folder


@pytest.fixture
def tiny_published(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> ClipModel:
    """The published way in, with the tiny architecture."""
    file = PublishedFile("x", "https://localhost:1/x", sha256_of_files([tiny_clip / "open_clip_model.safetensors"]))
    monkeypatch.setitem(ARCHITECTURES, "clip-b32", ("tiny-quickgelu", "openai"))
    monkeypatch.setitem(PUBLISHED, "clip-b32", file)
    return open_clip_model("clip-b32", CPU, {"clip-b32": tiny_clip / "open_clip_model.safetensors"})


PROMPTS = ["a bold three", "the digit nine", "zero", "a very long sentence of many more words than it takes"]


@pytest.mark.parametrize("shape", [(32, 32), (50, 40), (20, 90)])
def test_clip_is_open_clips_own_computation(shape: tuple[int, int], tiny_published: ClipModel, tiny_clip: Path) -> None:
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-quickgelu", pretrained=str(tiny_clip / "open_clip_model.safetensors")
    )
    batch = images(3, *shape)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]
    tokens = open_clip.get_tokenizer("tiny-quickgelu")(["A photo depicts " + prompt for prompt in PROMPTS])
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([transform(picture) for picture in pictures]))
        texts = model.encode_text(tokens)
    rows = tiny_published.extractor.run(batch)["image"]
    assert torch.allclose(rows, expected, atol=1e-6)
    assert torch.allclose(tiny_published.encode_prompts(PROMPTS, "A photo depicts "), texts, atol=1e-6)
    assert tiny_published.extractor.outputs == {"image": 12}
    assert tiny_published.extractor.published
    assert (rows.norm(dim=1) - 1).abs().min() > 0.01  # not normalised


def test_prompts_that_are_cut_keep_their_end(tiny_clip: Path) -> None:
    _, tokenizer, _ = load_clip_folder(tiny_clip)
    tokens = tokenizer(PROMPTS)
    assert tokens.shape == (4, 10)
    assert tokens[3, -1] == tokens.max() == tokens[2].max()


def test_a_clip_folder_has_its_own_preprocessing(tiny_clip: Path) -> None:
    model, _, transform = load_clip_folder(tiny_clip)
    image = images(1, 40, 20)[0]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    assert torch.allclose(transform(Image.fromarray(image.permute(1, 2, 0).numpy())), expected, atol=1e-5)
    extractor = open_clip_model("clip", CPU, {"clip": tiny_clip}).extractor
    assert torch.allclose(extractor.run(image[None])["image"], model.encode_image(expected[None]), atol=1e-5)
    assert not extractor.published
    assert not model.training


def copied(source: Path, target: Path, **model_config: object) -> Path:
    target.mkdir()
    (target / "open_clip_model.safetensors").symlink_to(source / "open_clip_model.safetensors")
    config = {"model_cfg": TINY | model_config}
    (target / "open_clip_config.json").write_text(json.dumps(config))
    return target


def write_tokenizer(folder: Path, **settings: object) -> None:
    """A word tokenizer of the `tokenizers` library, whose last token is the end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "<start>", "a", "bold", "three", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 6)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_clip_folder_has_its_own_tokenizer(tiny_clip: Path, tmp_path: Path) -> None:
    folder = copied(tiny_clip, tmp_path / "words", text_cfg=TINY["text_cfg"] | {"hf_tokenizer_name": "itself"})
    write_tokenizer(folder)
    _, tokenizer, _ = load_clip_folder(folder)
    tokens = tokenizer(["a bold three", "a " * 30])
    assert tokens[0].tolist() == [2, 3, 4, 5, 6, 0, 0, 0, 0, 0]
    assert tokens[1].tolist() == [2] + [3] * 8 + [6]


def test_a_clip_folder_runs_no_code_of_its_own(tiny_clip: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = TINY["text_cfg"] | {"hf_tokenizer_name": "itself"}
    remote = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
    trusting = {"tokenizer_kwargs": {"trust_remote_code": True}}
    for name, more, reason in (("a", {}, "custom code"), ("b", trusting, "multiple values")):
        folder = copied(tiny_clip, tmp_path / name, text_cfg=text | more)
        write_tokenizer(folder, **remote)
        (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nOwn = None\n")
        with pytest.raises(CheckpointError, match=reason):
            load_clip_folder(folder)
    for name, part in (("c", {"text_cfg": text | {"hf_model_name": "x/y"}}), ("d", {"custom_text": True})):
        with pytest.raises(CheckpointError, match=r"hf_model_name|custom_text"):
            load_clip_folder(copied(tiny_clip, tmp_path / name, **part))
    vision = TINY["vision_cfg"] | {"timm_model_name": "hf-hub:x/y"}
    with pytest.raises(CheckpointError, match="timm_model_name"):
        load_clip_folder(copied(tiny_clip, tmp_path / "e", vision_cfg=vision))
    assert not marker.exists()


def test_clip_folders_and_files_that_do_not_fit_say_so(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is of another architecture"):
        load_clip_folder(copied(tiny_clip, tmp_path / "wider", embed_dim=16))
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        load_clip_folder(tmp_path)
    empty = copied(tiny_clip, tmp_path / "empty")
    (empty / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors"):
        load_clip_folder(empty)
    with pytest.raises(CheckpointError, match="no folder is given"):
        open_extractor("clip", CPU, {})
    with pytest.raises(CheckpointError, match=r"no open_clip_config\.json in"):
        open_extractor("clip", CPU, {"clip": tmp_path})


def test_published_clip_models_are_open_clips() -> None:
    """Architecture, activation and repository, by open_clip's own tables."""
    assert ARCHITECTURES.keys() == {name for name, file in PUBLISHED.items() if file.repository and "clip" in name}
    for name, (architecture, tag) in ARCHITECTURES.items():
        published = open_clip.get_pretrained_cfg(architecture, tag)
        config = open_clip.get_model_config(architecture)
        assert published["hf_hub"] == PUBLISHED[name].repository + "/"
        assert config.get("quick_gelu", False) == (tag == "openai") == bool(published.get("quick_gelu"))
        with torch.device("meta"):
            open_clip.CLIP(**config)


def test_every_extractor_has_a_way_in() -> None:
    names = {"inception", "inception-clean", "dinov2", "digits", "digits-captioned", "digit-pairs"}
    assert names | set(clip_module.CLIP_MODELS) | {"hps21", "pickscore"} == EXTRACTORS.keys()
