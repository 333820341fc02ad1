"""The embedded CLIP model of captioned digits: what open_clip makes of it, and how well it judges unseen images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluation.extractors.clip import open_clip_model
from fdistill.assets import CLIP_DIGITS, EMBEDDED_TEACHERS
from fdistill.base.images import to_unit
from fdistill.data.digit_captions import (
    DIGIT_WORDS,
    PLAIN,
    WEIGHT_WORDS,
    WEIGHTED,
    load_captioned_digits,
    load_digit_images,
    true_prompts,
)

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

LOCAL = f"local-dir:{CLIP_DIGITS}"


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any, Any]:
    """(model, image transform, tokenizer) by open_clip alone."""
    model, preprocess = open_clip.create_model_from_pretrained(LOCAL)
    return model.eval(), preprocess, open_clip.get_tokenizer(LOCAL)


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """(images, labels, bold, one true caption each) that the model was not trained on."""
    from train_clip_digits import held_out_images

    images, labels, bold = load_digit_images()
    rows = held_out_images(len(images)).nonzero()[:, 0]
    captions = load_captioned_digits()[1]
    return images[rows], labels[rows], bold[rows], [captions[row].text for row in rows.tolist()]


@torch.no_grad()
def cosines(clip: tuple[Any, Any, Any], images: Tensor, texts: list[str]) -> Tensor:
    model, preprocess, tokenizer = clip
    image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures(images)])).double()
    text = model.encode_text(tokenizer(texts)).double()
    return (image @ text.T) / (image.norm(dim=1)[:, None] * text.norm(dim=1))


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in CLIP_DIGITS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    assert {path.suffix for path in files} == {".json", ".txt", ".md", ".safetensors"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


@pytest.mark.thorough
def test_open_clip_alone_loads_it_without_a_connection() -> None:
    code = (
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): raise RuntimeError(f'{event} {arguments}')\n"
        "sys.addaudithook(refuse)\n"
        "import open_clip, torch\n"
        f"model, preprocess = open_clip.create_model_from_pretrained({LOCAL!r})\n"
        f"tokens = open_clip.get_tokenizer({LOCAL!r})(['a bold seven'])\n"
        "assert 'fdistill' not in sys.modules\n"
        "print(type(model).__name__, next(model.parameters()).dtype, *model.encode_text(tokens).shape)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=CLIP_DIGITS.parent,
    )
    assert done.stdout.split() == ["CLIP", "torch.float32", "1", "32"]


def test_images_are_prepared_as_the_config_says(clip: tuple[Any, Any, Any], held_out: tuple[Any, ...]) -> None:
    images = held_out[0][:3]
    own = torch.stack([clip[1](picture) for picture in pictures(images)])
    assert (own - to_unit(images)).abs().max() < 1e-6
    larger = pictures(images)[0].resize((40, 40), Image.Resampling.BICUBIC)
    resized = torch.tensor(list(larger.resize((16, 16), Image.Resampling.BICUBIC).tobytes())).reshape(16, 16, 3)
    assert (clip[1](larger) - to_unit(resized.permute(2, 0, 1))).abs().max() < 1e-6


def test_the_tokenizer_is_that_of_digits_t2i(clip: tuple[Any, Any, Any]) -> None:
    for path in (EMBEDDED_TEACHERS["digits-t2i"] / "tokenizer").iterdir():
        assert (CLIP_DIGITS / path.name).read_bytes() == path.read_bytes()
    tokens = clip[2](["A Bold Zero", "seven " * 40])
    end = tokens.max().item()  # open_clip takes the features at the first token of the highest number
    vocabulary = json.loads((CLIP_DIGITS / "vocab.json").read_text(encoding="utf-8"))
    words = ["<|startoftext|>", "a</w>", "bold</w>", "zero</w>", *["<|endoftext|>"] * 12]
    assert tokens[0].tolist() == [vocabulary[word] for word in words]
    assert end == vocabulary["<|endoftext|>"] == len(vocabulary) - 1 == clip[0].vocab_size - 1
    assert tokens[1].tolist() == [vocabulary[words[0]], *[vocabulary["seven</w>"]] * 14, end]


def test_no_held_out_image_was_trained_on() -> None:
    from train_clip_digits import held_out_images

    images = load_digit_images()[0]
    mask = held_out_images(len(images))
    assert mask.sum() == 359
    assert torch.equal(mask, held_out_images(len(images)))
    x = images[:, 0].flatten(1).double()
    assert torch.cdist(x[mask], x[~mask], compute_mode="donot_use_mm_for_euclid_dist").min() > 50


@pytest.mark.thorough
def test_it_reads_digit_and_weight_of_held_out_images(clip: tuple[Any, Any, Any], held_out: tuple[Any, ...]) -> None:
    images, labels, bold, _ = held_out
    rows = torch.arange(len(images))
    noise = torch.randint(-25, 26, images.shape, generator=torch.Generator().manual_seed(1))
    for shown in (images, (images + noise).clamp(0, 255).to(torch.uint8)):
        for phrase in PLAIN:
            matrix = cosines(clip, shown, [phrase.format(digit=digit) for digit in DIGIT_WORDS])
            assert (matrix.argmax(1) == labels).double().mean() > 0.97, phrase
        for phrase in WEIGHTED:
            of_weights = [
                cosines(clip, shown, [phrase.format(weight=w, digit=d) for d in DIGIT_WORDS])[rows, labels]
                for w in WEIGHT_WORDS
            ]
            assert ((of_weights[1] > of_weights[0]) == bold).double().mean() > 0.9, phrase


def test_wrong_prompts_lower_the_cosine(clip: tuple[Any, Any, Any], held_out: tuple[Any, ...]) -> None:
    images, labels, bold, captions = held_out
    rows = torch.arange(len(images))
    matrix = cosines(clip, images, captions)
    right = matrix.diagonal().mean()
    assert right > 0.8
    assert matrix[rows, torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))].mean() < 0.1
    weighted = [f"a {weight} {digit}" for digit in DIGIT_WORDS for weight in WEIGHT_WORDS]
    matrix = cosines(clip, images, weighted).reshape(-1, 10, 2)
    assert matrix[rows, labels, bold.long()].mean() > 0.8
    assert matrix[rows, labels, (~bold).long()].mean() < 0.5
    assert matrix[rows, (labels + 1) % 10].mean() < 0.1
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    assert cosines(clip, noise, captions).diagonal().mean() < 0.3


def test_the_projects_own_door_gives_the_cosines_of_open_clip(
    clip: tuple[Any, Any, Any], held_out: tuple[Any, ...]
) -> None:
    images, captions = held_out[0][:50], held_out[3][:50]
    own = open_clip_model("clip-digits", torch.device("cpu"), {})
    image = F.normalize(own.extractor.run(images)["image"].double())
    text = F.normalize(own.encode_prompts(captions).double())
    assert own.extractor.outputs == {"image": 32}
    assert (image @ text.T - cosines(clip, images, captions)).abs().max() < 1e-6


def test_the_card_has_the_measured_scores(clip: tuple[Any, Any, Any], held_out: tuple[Any, ...]) -> None:
    scores, card = json.loads((CLIP_DIGITS / "training.json").read_text()), (CLIP_DIGITS / "README.md").read_text()
    clean, pairs = scores["held_out"], scores["with_their_prompts_and_shuffled"]
    for name in ("digit_accuracy", "weight_accuracy", "both_accuracy"):
        assert f"{clean[name]:.1%}" in card
    for value in (
        clean["cosine_true"],
        clean["cosine_wrong_weight"],
        clean["cosine_wrong_digit"],
        *pairs["guidance_2"],
    ):
        assert f"{value:.3f}" in card
    assert clean["digit_accuracy"] > 0.97
    assert clean["weight_accuracy"] > 0.85
    assert pairs["guidance_2"][0] > pairs["guidance_2"][1] + 0.6
    assert pairs["held_out"][0] == pytest.approx(
        cosines(clip, held_out[0], held_out[3]).diagonal().mean().item(), abs=2e-4
    )
    assert scores["training_cpu_minutes"] < 10


def test_captions_are_true_of_the_images_they_are_trained_on() -> None:
    from train_clip_digits import all_prompts, is_true

    prompts = all_prompts()
    assert len({p.text for p in prompts}) == len(prompts) == 130
    labels, bold = torch.arange(10).repeat(2), torch.arange(2).repeat_interleave(10).bool()
    right_digit, right_weight = is_true(prompts, labels, bold)
    for row in range(20):
        digit, weight = labels[row].item(), WEIGHT_WORDS[int(bold[row])]
        other = WEIGHT_WORDS[1 - int(bold[row])]
        assert {p.text for p, true in zip(prompts, right_digit[row] & right_weight[row], strict=True) if true} == {
            p.text for p in true_prompts(int(digit), weight)
        }
        for p, same_digit, same_weight in zip(prompts, right_digit[row], right_weight[row], strict=True):
            assert same_digit == (DIGIT_WORDS[int(digit)] in p.text.split())
            assert same_weight == (other not in p.text.split())


def test_the_loss_is_that_of_clip_where_one_caption_is_true() -> None:
    from train_clip_digits import cross_entropy_of_several

    image, text = (F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(k))) for k in (0, 1))
    logits, true = 10.0 * image @ text.T, torch.eye(6, dtype=torch.bool)
    own = (cross_entropy_of_several(logits, true) + cross_entropy_of_several(logits.T, true.T)) / 2
    assert own.item() == pytest.approx(open_clip.ClipLoss()(image, text, torch.tensor(10.0)).item(), abs=1e-6)


def test_the_loss_spreads_its_targets_over_the_true_captions() -> None:
    from train_clip_digits import cross_entropy_of_several

    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    true = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    expected = [-probabilities[0, :2].log().mean(), -probabilities[2, 1:].log().mean()]
    assert cross_entropy_of_several(logits, true).item() == pytest.approx((sum(expected) / 2).item(), abs=1e-6)


def test_images_are_moved_by_at_most_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    import train_clip_digits

    monkeypatch.setattr(train_clip_digits, "NOISE", 0.0)
    torch.manual_seed(0)
    x = torch.full((200, 3, 16, 16), -1.0)
    x[:, :, 5, 9] = 1.0
    moved = train_clip_digits.augment(x)
    assert moved.sum().item() == x.sum().item()
    places = {tuple(index[2:]) for index in (moved > 0).nonzero().tolist()}
    assert places == {(row, column) for row in (4, 5, 6) for column in (8, 9, 10)}


def test_the_script_trains_and_writes_such_a_folder(tmp_path: Path, held_out: tuple[Any, ...]) -> None:
    from train_clip_digits import all_prompts, is_true, save, train

    images, labels, bold, _ = held_out
    prompts = all_prompts()
    texts = [p.text for p in prompts]
    tokens = open_clip.get_tokenizer(LOCAL)(texts)
    right_digit, right_weight = is_true(prompts, labels, bold)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(train(to_unit(images), tokens, right_digit & right_weight, iterations=12))
    first, again = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["logit_scale"].exp().item() == pytest.approx(10)

    save(models[0], tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written | {"README.md", "training.json"} == {path.name for path in CLIP_DIGITS.iterdir()}
    for name in written - {"open_clip_model.safetensors"}:
        assert (tmp_path / name).read_bytes() == (CLIP_DIGITS / name).read_bytes()
    read, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    assert all(torch.equal(value, first[name].half().float()) for name, value in read.state_dict().items())
