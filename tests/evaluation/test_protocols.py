"""The named protocols: what each prepares, and what the names of its scores promise.

Where each of the 17 points is tested that implementers get wrong; "here" and "end" are this file and
test_evaluate_end_to_end.py:
1. weights: test_extractors test_inception_is_torch_fidelitys_bit_by_bit,
   test_other_weights_are_marked_as_not_published; here test_names_say_what_of_the_protocol_was_not_kept_to.
2. resize: test_extractors test_clean_resizing_is_bicubic_antialiased_and_not_rounded and the same bit-by-bit test;
   test_images test_torchvisions_crop_and_resize; here test_protocols_are_those_of_the_papers.
3. rounding: test_generated test_pixels_are_rounded_and_not_truncated; test_data_and_rng
   test_bytes_round_trip_and_clip_before_rounding.
4. bytes, not floats: test_images test_numbers_are_refused_with_the_way_to_round_those_of_their_range; test_extractors
   test_images_of_another_form_are_refused.
5. precision: test_extractors test_full_precision_holds_inside_and_leaves_no_trace; test_moments
   test_low_precision_rows_are_summed_in_float64; end test_neither_batches_nor_order_matter.
6. covariance: test_metrics test_a_covariance_that_starts_at_ones_would_be_seen; test_moments
   test_two_processes_with_unequal_shares.
7. trace and refusal: test_metrics test_frechet_distance_is_torch_fidelitys_and_the_plain_formula; end
   test_what_cannot_be_measured_is_refused_before_anything_is_extracted.
8. exactly N: test_features test_every_image_is_read_once_in_order_the_last_batch_too; end
   test_two_processes_score_as_one.
9. noise by sample: test_generated test_an_image_depends_on_seed_and_number_and_not_on_its_batch.
10. labels by sample: test_generated test_classes_are_in_turn_or_random_by_the_sample; end
    test_two_processes_score_as_one.
11. references: here test_protocols_are_those_of_the_papers, test_names_say_what_of_the_protocol_was_not_kept_to,
    test_references_of_another_kind_are_refused; test_references test_adms_npz_is_its_mu_and_sigma_not_its_images.
12. COCO: here test_protocols_are_those_of_the_papers, test_coco10k_sees_patches_and_clip_sees_256_pixels.
13. guidance: here test_provenance_says_how_to_repeat_it; end test_a_pipeline_is_scored_by_a_clip_of_ones_own.
14. PNG: end test_lossy_samples_are_warned_of.
15. CLIP: test_metrics test_clip_scores_by_hand; test_extractors test_clip_is_open_clips_own_computation; here
    test_coco10k_sees_patches_and_clip_sees_256_pixels.
16. end of text, QuickGELU: test_extractors test_prompts_are_encoded_in_batches_and_cut_ones_keep_their_end,
    test_published_clip_models_are_open_clips.
17. average, seeds: here test_provenance_says_how_to_repeat_it; end test_several_seeds_give_mean_and_deviation.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation import statistics_files
from evaluation.evaluate import evaluate
from evaluation.extractors import EXTRACTORS, Extractor
from evaluation.extractors.clip import load_clip_folder
from evaluation.features import Extraction
from evaluation.generated import GeneratedImages
from evaluation.make_reference import make_reference
from evaluation.metrics.inception_score import inception_score
from evaluation.protocols import PROTOCOLS, get_protocol
from evaluation.reference import open_reference
from fdistill import distill
from fdistill.assets import CLIP_DIGITS
from fdistill.base.errors import ArgumentError
from fdistill.commands import options

CPU = torch.device("cpu")
CLIP_PREFIX = "A photo depicts "

#: name: samples, size, channels, recipe, reference recipe, reference images, reference files, extractors of the default
#: metrics, their CLIP, views, random labels, embedded reference
FACTS: dict[str, tuple[Any, ...]] = {
    "cifar10-fid50k": (
        *(50_000, 32, 3, "exact", "exact", 50_000, {"cifar10-32x32.npz", "cifar10_legacy_tensorflow_train_32.npz"}),
        *({"fid": "inception.pool", "recall": "inception.pool"}, None, {}, True, None),
    ),
    "imagenet64-fid50k": (
        *(50_000, 64, 3, "exact", "center-lanczos", 1_281_167, {"imagenet-64x64.npz"}),
        *({"fid": "inception.pool", "recall": "inception.pool"}, None, {}, True, None),
    ),
    "imagenet64-edm2": (
        *(50_000, 64, 3, "exact", "adm", 1_281_167, {"img64.pkl"}),
        *({"fid": "inception.pool"}, None, {}, True, None),
    ),
    "imagenet256-adm": (
        *(50_000, 256, 3, "exact", "adm", 1_281_167, {"VIRTUAL_imagenet256_labeled.npz"}),
        {
            "fid": "inception.pool",
            "inception_score": "inception.logits",
            "precision": "inception.pool",
            "recall": "inception.pool",
        },
        *(None, {}, True, None),
    ),
    "imagenet512-edm2": (
        *(50_000, 512, 3, "exact", "adm", 1_281_167, {"img512.pkl"}),
        *({"fid": "inception.pool", "fd_dinov2": "dinov2.cls"}, None, {}, True, None),
    ),
    "coco30k-dmd2": (
        *(30_000, 256, 3, "torchvision-lanczos", "torchvision-lanczos", 40_504, set()),
        {"fid": "inception-clean.pool", "clip_cosine": "clip-g14.image"},
        *(("clip-g14", CLIP_PREFIX), {}, False, None),
    ),
    "coco10k-sdxl": (
        *(10_000, 512, 3, "torchvision-lanczos", "torchvision-lanczos", 10_000, set()),
        {"fid": "inception-clean.pool", "patch_fid": "inception-clean@patch.pool", "clip_cosine": "clip-g14@256.image"},
        ("clip-g14@256", CLIP_PREFIX),
        {"patch": ("center-patch", 299), "256": ("torchvision-lanczos", 256)},
        *(False, None),
    ),
    "few-step-t2i": (
        *(None, None, 3, "exact", "exact", None, set()),
        {
            "hpsv2.1": "hps21.image",
            "pickscore": "pickscore.image",
            "imagereward": (),
            "clip_x100": "clip-l14.image",
            "fid_t": "inception-clean.pool",
            "patch_fid_t": "inception-clean@patch.pool",
            "diversity_dinov2": "dinov2.cls",
            "lpips_diversity": (),
        },
        *(("clip-l14", ""), {"patch": ("center-patch", 299)}, False, None),
    ),
    "digits": (
        *(1797, 8, 1, "exact", "exact", 1797, set()),
        {
            "fd_digits": "digits.features",
            "precision": "digits.features",
            "recall": "digits.features",
            "class_accuracy": "digits.logits",
        },
        *(None, {}, False, "digits"),
    ),
    "digits-t2i": (
        *(500, 16, 3, "exact", "exact", 1797, set()),
        {
            "prompt_accuracy": "digits-captioned.logits",
            "ink_bold": "digits-captioned.ink",
            "ink_thin": "digits-captioned.ink",
            "fd_digits": "digits-captioned.features",
            "clip_digits": "clip-digits.image",
        },
        *(("clip-digits", ""), {}, False, "digit-captions"),
    ),
    "digit-pairs": (
        *(500, 16, 3, "exact", "exact", 5000, set()),
        {
            "pair_accuracy": ("digit-pairs.left", "digit-pairs.right"),
            "exchanged": ("digit-pairs.left", "digit-pairs.right"),
            "fd_pairs": "digit-pairs.features",
        },
        *(None, {}, False, "digit-pairs"),
    ),
    "folder": (
        *(None, None, 3, "exact", "exact", None, set()),
        *({"fid": "inception.pool"}, ("clip-l14", ""), {}, False, None),
    ),
}


@pytest.mark.parametrize("name", [*FACTS, *(PROTOCOLS.keys() - FACTS.keys())])
def test_protocols_are_those_of_the_papers(name: str) -> None:
    protocol = get_protocol(name)
    samples, size, channels, recipe, reference_recipe, images, files, default, clip, views, random_labels, own = FACTS[
        name
    ]
    assert (protocol.num_samples, protocol.size, protocol.channels) == (samples, size, channels)
    assert (protocol.recipe, protocol.reference_recipe) == (recipe, reference_recipe)
    assert (protocol.reference_count, set(protocol.reference_files), protocol.embedded) == (images, files, own)
    assert {key: protocol.names()[key].features for key in protocol.default} == {
        key: features if isinstance(features, tuple) else (features,) for key, features in default.items()
    }
    others = {"folder": {("clip", "")}, "few-step-t2i": {("hps21", ""), ("pickscore", "")}}
    own_clip = others.get(name, set())
    assert {metric.clip for metric in protocol.metrics} - {None} == ({clip} if clip else set()) | own_clip
    assert (dict(protocol.views), protocol.random_labels) == (views, random_labels)
    classes = 10 if name in ("digits", "cifar10-fid50k") else 1000 if name.startswith("imagenet") else None
    assert protocol.num_classes == classes
    assert protocol.asks_prompts == (name.startswith("coco") or name == "few-step-t2i")
    assert [metric.name for metric in protocol.metrics if "@patch" in str(metric.features)] == (
        [] if "patch" not in views else ["patch_fid_t"] if name == "few-step-t2i" else ["patch_fid"]
    )
    fids = {metric.features for metric in protocol.metrics if metric.name in ("fid", "fid_infinity", "kid")}
    # Nothing of the digit network is called FID, nor is a distance to the teacher's images.
    assert len(fids) == (0 if own or name == "few-step-t2i" else 1)


def test_the_help_names_every_protocol() -> None:
    described = get_args(options.Protocol)[1].help
    assert set(re.findall(r"[a-z0-9-]+", described.rpartition(": ")[2])) - {"or"} == PROTOCOLS.keys()


def test_inception_scores_are_shuffled_but_for_adms() -> None:
    """ADM's splits are stretches of the samples in their order: sorted logits tell the two apart."""
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).sort(dim=0).values
    expected = {shuffled: inception_score(logits, shuffled=shuffled).value for shuffled in (True, False)}
    assert expected[True] != pytest.approx(expected[False], rel=1e-3)
    found = {}
    for name, protocol in PROTOCOLS.items():
        if "inception_score" in protocol.names():
            metric = protocol.names()["inception_score"]
            measured: Any = type(
                "Measured", (), {"samples": {metric.features[0]: logits}, "images": SimpleNamespace(labels=None)}
            )
            found[name] = metric.compute(measured)["inception_score"].value
    assert found == {name: expected[name != "imagenet256-adm"] for name in found}
    assert len(found) == 8


# --- what the views see


def smooth(height: int, width: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[H, W, 3] of coarse blocks and fine noise: PNG packs it, and every pixel tells where it is."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200, (-(-height // 32), -(-width // 32), 3)).repeat(32, 0).repeat(32, 1)
    fine = random.integers(0, 56, (64, 64, 3))
    tiles = np.tile(fine, (-(-height // 64), -(-width // 64), 1))
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = (coarse[:height, :width] + tiles[:height, :width]).astype(np.uint8)
    return pixels


def write(folder: Path, pictures: Sequence[np.ndarray[Any, Any]], **manifest: Any) -> Path:
    folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:06d}.png", compress_level=1)
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def lanczos(picture: np.ndarray[Any, Any], size: int) -> Tensor:
    """Of a square, by PIL itself."""
    resized = Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def bytes_of(picture: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


class Recorder:
    """An extractor of four numbers an image, which keeps what it was shown."""

    def __init__(self, name: str, published: bool = True, sha256: str = "a1b2c3d4" * 8, preparation: str = "means"):
        self.name, self.published, self.sha256, self.preparation = name, published, sha256, preparation
        self.seen: list[Tensor] = []

    def run(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.extend(images)
        x = images.float()
        rows = torch.cat([x.mean((2, 3)), x.std((1, 2, 3))[:, None]], 1)
        return {"pool": rows, "logits": rows.repeat(1, 2) / 50}

    def extractor(self, *_: object) -> Extractor:
        return Extractor(self.name, {"pool": 4, "logits": 8}, self.run, self.preparation, self.sha256, self.published)


def test_coco10k_sees_patches_and_clip_sees_256_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FID at 512, patches of 299 pixels of images as they are, CLIP at 256 of the image of 1,024 and not of the one of
    512; its prompts have the prefix, and its mean is of raw cosines."""
    seen = Recorder("inception-clean")
    monkeypatch.setitem(EXTRACTORS, "inception-clean", seen.extractor)
    samples = [smooth(1024, 1024, i) for i in range(6)]
    photographs = [smooth(480, 640, 10 + i) for i in range(4)] + [smooth(640, 427, 14), smooth(200, 700, 15)]
    prompts = [f"{text} {number}" for text in ("a bold", "a thin") for number in ("one", "four", "nine")]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    with pytest.warns(UserWarning, match=r"6 images, and protocol 'coco10k-sdxl' wants 10000"):
        result = evaluate(
            write(tmp_path / "samples", samples),
            protocol="coco10k-sdxl",
            reference=write(tmp_path / "photographs", photographs),
            prompts=file,
            weights={"clip-g14": CLIP_DIGITS},
            replicates=0,
            batch_size=4,
            device="cpu",
        )
    mark = result["provenance"]["extractors"]["clip-g14@256"]["sha256"][:8]
    assert result["metrics"].keys() == {
        "fid@6 vs photographs",
        "patch_fid@6 vs photographs",
        f"clip_cosine@6 (other weights {mark})",
    }
    shown = {tuple(image.shape[1:]) for image in seen.seen}
    assert shown == {(512, 512), (299, 299)}
    whole = [image for image in seen.seen if image.shape[1] == 512]
    patches = [image for image in seen.seen if image.shape[1] == 299]

    def among(wanted: Tensor, images: list[Tensor]) -> bool:
        return any(torch.equal(wanted, image) for image in images)

    for picture in samples:
        assert among(lanczos(picture, 512), whole)
        assert among(bytes_of(picture[362:661, 362:661]), patches)
    assert among(lanczos(photographs[0][:, 80:560], 512), whole)  # enlarged
    assert among(bytes_of(photographs[0][90:389, 170:469]), patches)
    assert among(bytes_of(photographs[4][170:469, 64:363]), patches)
    stretched = Image.fromarray(photographs[5]).resize((299, 299), Image.Resampling.BICUBIC)
    assert among(bytes_of(np.array(stretched)), patches)  # smaller on one side

    model, tokenizer, transform = load_clip_folder(CLIP_DIGITS)
    clip: Any = model

    def cosine(size: int, prefix: str) -> float:
        small = [lanczos(picture, 512).permute(1, 2, 0).numpy() if size == 512 else picture for picture in samples]
        pictures = [Image.fromarray(lanczos(picture, 256).permute(1, 2, 0).numpy()) for picture in small]
        with torch.no_grad():
            image = clip.encode_image(torch.stack([transform(picture) for picture in pictures])).double()
            text = clip.encode_text(tokenizer([prefix + prompt for prompt in prompts])).double()
        return torch.nn.functional.cosine_similarity(image, text).mean().item()

    found = result["metrics"][f"clip_cosine@6 (other weights {mark})"]
    assert found == pytest.approx(cosine(1024, CLIP_PREFIX), abs=1e-6)
    assert abs(found - cosine(512, CLIP_PREFIX)) > 1e-5
    assert abs(found - cosine(1024, "")) > 1e-3


def test_generated_samples_have_the_same_views(tmp_path: Path) -> None:
    protocol = get_protocol("coco10k-sdxl")
    picture = smooth(1024, 1024, 0)

    class Made:
        name, kind, sampler, num_steps, weights_sha256 = "made", "student", None, None, ""
        takes_prompts, num_classes, guidance_scale = True, None, None

        def sample(self, *_: object) -> Tensor:
            return bytes_of(picture)[None]

    views = GeneratedImages(Made(), 0, 1, ["a"], CPU, protocol).views(protocol)  # type: ignore[arg-type]
    assert torch.equal(views[""].read([0])[0], lanczos(picture, 512))
    assert torch.equal(views["256"].read([0])[0], lanczos(picture, 256))
    assert torch.equal(views["patch"].read([0])[0], bytes_of(picture[362:661, 362:661]))


def test_imagenets_are_prepared_as_their_references(tmp_path: Path) -> None:
    """EDM's squares and LANCZOS, EDM2's and ADM's BOX and BICUBIC before the square: all by PIL itself."""
    picture = smooth(150, 201, 3)
    folder = write(tmp_path / "images", [picture])

    def prepared(name: str) -> Tensor:
        reference = open_reference(get_protocol(name), folder)
        assert reference is not None
        return reference.views[""].read([0])[0]

    assert torch.equal(prepared("imagenet64-fid50k"), lanczos(picture[:, 25:175], 64))
    image = Image.fromarray(picture).resize((100, 75), Image.Resampling.BOX)
    image = image.resize((round(100 * 64 / 75), 64), Image.Resampling.BICUBIC)
    left = (image.width - 64) // 2
    expected = bytes_of(np.array(image)[:, left : left + 64])
    assert torch.equal(prepared("imagenet64-edm2"), expected)
    assert not torch.equal(prepared("imagenet64-fid50k"), expected)


# --- names


CIFAR = "cifar10-fid50k"


def noise(count: int, seed: int, size: int = 32) -> list[np.ndarray[Any, Any]]:
    """Images whose means and deviations differ."""
    random = np.random.default_rng(seed)
    levels = random.uniform(40, 200, (count, 1, 1, 3)) + random.uniform(5, 40, (count, 1, 1, 1)) * random.normal(
        size=(count, size, size, 3)
    )
    return list(levels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """CIFAR-10 of 30 samples against 40 images, by an extractor of four features in place of Inception."""
    recorder = Recorder("inception")
    monkeypatch.setitem(EXTRACTORS, "inception", recorder.extractor)
    monkeypatch.setitem(statistics_files._WIDTHS, "inception.pool", 4)
    monkeypatch.setitem(PROTOCOLS, CIFAR, replace(PROTOCOLS[CIFAR], num_samples=30, reference_count=40))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*names show the count")
        yield recorder


def statistics(pictures: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    rows = Recorder("").run(torch.stack([bytes_of(p) for p in pictures]))["pool"].double().numpy()
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def score(samples: Path, reference: Path | None, metrics: Sequence[str] = ("fid",), **options: Any) -> dict[str, float]:
    result = evaluate(
        samples, protocol=CIFAR, reference=reference, metrics=metrics, replicates=0, device="cpu", **options
    )
    scores: dict[str, float] = result["metrics"]
    return scores


def test_names_say_what_of_the_protocol_was_not_kept_to(small: Recorder, tmp_path: Path) -> None:
    samples, fewer = write(tmp_path / "samples", noise(30, 0)), write(tmp_path / "fewer", noise(29, 0))
    train, other = write(tmp_path / "train", noise(40, 1)), write(tmp_path / "other", noise(39, 1))
    held = statistics(noise(40, 1))
    files = {name: tmp_path / name for name in ("cifar10-32x32.npz", "cifar10_legacy_tensorflow_train_32.npz")}
    for path in files.values():
        np.savez(path, **held)
    adm = tmp_path / "VIRTUAL_imagenet32.npz"
    np.savez(adm, arr_0=np.stack(noise(20, 7)), **held)  # its images are not those of its moments
    fidelity = tmp_path / "cifar10-train-inception-v3-compat-stat-fid-2048.pt"
    torch.save(held, fidelity)

    value = score(samples, train)["fid"]
    for path in files.values():
        assert score(samples, path) == {"fid": pytest.approx(value, rel=1e-9)}
    assert score(fewer, train).keys() == {"fid@29"}
    assert score(samples, train, num_images=12).keys() == {"fid@12"}
    assert score(samples, other).keys() == {"fid vs other"}
    assert score(fewer, other, ["recall", "inception_score"]).keys() == {"recall@29 vs other", "inception_score@29"}
    for path in (adm, fidelity):
        assert score(samples, path) == {f"fid vs {path.name}": pytest.approx(value, rel=1e-9)}
    some = score(samples, write(tmp_path / "some", noise(20, 7)), ["recall"])["recall vs some"]
    assert score(samples, adm, ["recall"]) == {f"recall vs {adm.name}": pytest.approx(some)}
    small.published = False
    assert score(samples, train) == {"fid (other weights a1b2c3d4)": pytest.approx(value)}
    assert score(fewer, other).keys() == {"fid@29 vs other (other weights a1b2c3d4)"}


def test_own_references_give_the_images_own_number(small: Recorder, tmp_path: Path) -> None:
    samples, train = write(tmp_path / "samples", noise(30, 0)), write(tmp_path / "train", noise(40, 1))
    metrics = ["fid", "recall", "density", "authenticity"]
    value = score(samples, train, metrics)
    own = make_reference(
        train, output=tmp_path / "own.npz", protocol=CIFAR, metrics=metrics, batch_size=7, device="cpu"
    )
    assert score(samples, own, metrics) == {name: pytest.approx(number, rel=1e-9) for name, number in value.items()}
    streamed = make_reference(train, output=tmp_path / "streamed.npz", protocol=CIFAR, batch_size=7, device="cpu")
    assert score(samples, streamed) == {"fid": pytest.approx(value["fid"], rel=1e-9)}
    with np.load(streamed) as arrays:
        held = statistics(noise(40, 1))
        for key in ("mu", "sigma"):
            np.testing.assert_allclose(arrays[key], held[key], rtol=1e-9)
            np.testing.assert_allclose(arrays[f"inception.pool/{key}"], held[key], rtol=1e-9)
        facts = json.loads(str(arrays["facts"]))
    assert (facts["protocol"], facts["count"], facts["resolution"]) == (CIFAR, 40, 32)
    other = write(tmp_path / "other", noise(39, 1))
    few = make_reference(other, output=tmp_path / "few.npz", protocol=CIFAR, device="cpu")
    assert score(samples, few).keys() == {"fid vs few.npz"}
    plain = make_reference(train, output=tmp_path / "plain.npz", protocol="folder", device="cpu")
    assert score(samples, plain).keys() == {"fid vs plain.npz"}  # made by another protocol
    with pytest.raises(ArgumentError, match=r"recall needs the reference's images, and .*holds statistics alone"):
        score(samples, streamed, ["recall"])


def test_own_references_are_prepared_as_the_protocols(small: Recorder, tmp_path: Path) -> None:
    """EDM's ImageNet: squares and LANCZOS of photographs, which as samples are refused."""
    photographs = write(tmp_path / "photographs", [smooth(70 + i, 90, i) for i in range(10)])
    path = make_reference(photographs, output=tmp_path / "own.npz", protocol="imagenet64-fid50k", device="cpu")
    squares = [smooth(70 + i, 90, i) for i in range(10)]
    squares = [p[:, (90 - len(p)) // 2 :][:, : len(p)] for p in squares]
    held = statistics([lanczos(p, 64).permute(1, 2, 0).numpy() for p in squares])
    with np.load(path) as arrays:
        np.testing.assert_allclose(arrays["mu"], held["mu"], rtol=1e-9)
        np.testing.assert_allclose(arrays["sigma"], held["sigma"], rtol=1e-9)


def test_the_folder_protocol_takes_any_images_of_one_size(small: Recorder, tmp_path: Path) -> None:
    samples, train = write(tmp_path / "samples", noise(10, 0)), write(tmp_path / "train", noise(11, 1))
    large = write(tmp_path / "large", noise(10, 2, size=48))
    how: dict[str, Any] = {"protocol": "folder", "replicates": 0, "device": "cpu"}
    value = evaluate(samples, reference=train, **how)["metrics"]
    assert value.keys() == {"fid@10 vs train"}  # any number of any images is no one's protocol
    own = make_reference(train, output=tmp_path / "own.npz", protocol="folder", device="cpu")
    assert evaluate(samples, reference=own, **how)["metrics"] == {
        "fid@10 vs own.npz": pytest.approx(value["fid@10 vs train"], rel=1e-9)
    }
    with pytest.raises(ArgumentError, match="6 images, and the covariance of 8 features needs more than 8"):
        make_reference(write(tmp_path / "few", noise(6, 1)), output=tmp_path / "f.npz", protocol="folder", device="cpu")
    small.seen.clear()
    for reference, made in ((train, "32x32"), (own, "32x32")):
        with pytest.raises(ArgumentError, match=f"has images of {made}, samples .*large of 48x48"):
            evaluate(large, reference=reference, **how)
    named = tmp_path / "mine-32x32.npz"
    np.savez(named, **statistics(noise(11, 1)))
    assert evaluate(samples, reference=named, **how)["metrics"].keys() == {"fid@10 vs mine-32x32.npz"}
    with pytest.raises(ArgumentError, match=r"has images of 32x32, samples .*large of 48x48"):
        evaluate(large, reference=named, **how)
    assert all(image.shape[1] == 32 for image in small.seen)  # nothing of the large ones was extracted


def test_references_of_another_kind_are_refused(small: Recorder, tmp_path: Path) -> None:
    """By resolution, extractor, its weights or its preparation; and before anything of the samples is extracted."""
    samples, train = write(tmp_path / "samples", noise(30, 0)), write(tmp_path / "train", noise(40, 1))
    held = statistics(noise(40, 1))
    large, clean = tmp_path / "imagenet-64x64.npz", tmp_path / "cifar10_clean_train_32.npz"
    np.savez(large, **held)
    with pytest.raises(
        ArgumentError, match=r"of images of 64x64, and protocol 'cifar10-fid50k' compares 32x32; pass EDM"
    ):
        score(samples, large)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(statistics_files._WIDTHS, "inception-clean.pool", 4)
        np.savez(clean, **held)
        with pytest.raises(ArgumentError, match=r"holds statistics of inception-clean.pool, and none of inception;"):
            score(samples, clean)
    own = make_reference(train, output=tmp_path / "own.npz", protocol=CIFAR, device="cpu")
    small.seen.clear()
    small.sha256 = "f" * 64
    with pytest.raises(ArgumentError, match=r"made with another inception \(sha256 'a1b2c3d4.*make it again"):
        score(samples, own)
    small.sha256, small.preparation = Recorder("").sha256, "resized otherwise"
    with pytest.raises(ArgumentError, match=r"made with another inception \(preparation 'means', here 'resized"):
        score(samples, own)
    assert not small.seen


def test_features_of_torch_fidelity_serve_metrics_of_single_images(small: Recorder, tmp_path: Path) -> None:
    """Its cache holds the pool alone, which is all that these read."""
    samples, train = write(tmp_path / "samples", noise(30, 0)), write(tmp_path / "train", noise(40, 1))
    rows = small.run(torch.stack([bytes_of(picture) for picture in noise(40, 1)]))["pool"]
    file = tmp_path / "mine-inception-v3-compat-features-2048.pt"
    torch.save(rows, file)
    expected = score(samples, train, ["recall", "fid"])
    found = score(samples, file, ["recall", "fid"])
    assert list(found.values()) == [pytest.approx(expected["recall"]), pytest.approx(expected["fid"], rel=1e-9)]


def test_many_reference_images_are_streamed_once_for_all_seeds(
    small: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluation import reference

    samples, train = write(tmp_path / "samples", noise(30, 0)), write(tmp_path / "train", noise(40, 1))
    expected = score(samples, train)["fid"]
    monkeypatch.setattr(reference, "_KEPT_ROWS", 10)
    opened = open_reference(get_protocol(CIFAR), train)
    assert opened is not None
    small.seen.clear()
    for _ in range(2):
        moments = opened.moments({"inception": small.extractor()}, Extraction(16, CPU))["inception.pool"]
    assert len(small.seen) == 40
    held = statistics(noise(40, 1))
    np.testing.assert_allclose(moments.covariance.numpy(), held["sigma"], rtol=1e-9)
    assert score(samples, train)["fid"] == pytest.approx(expected, rel=1e-9)
    small.seen.clear()
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    score(samples, train, ["fid", "recall"])  # whose rows serve both
    assert len(small.seen) == 30 + 40


# --- provenance


def test_provenance_says_how_to_repeat_it(tiny_teacher: Path, tmp_path: Path) -> None:
    """The student's training, with its teacher's guidance and which average its weights are; the seeds; guidance and
    steps of a teacher."""
    run = tmp_path / "run"
    distill("digits", output=run, teacher=str(tiny_teacher), batch_size=8, iterations=1, seed=3)
    how: dict[str, Any] = {"metrics": ["class_accuracy"], "num_images": 20, "device": "cpu", "replicates": 0}
    with pytest.warns(UserWarning, match="20 images"):
        provenance = evaluate(run, seeds=[4], **how)["provenance"]
    assert (provenance["kind"], provenance["seeds"], provenance["evaluations_per_image"], provenance["guidance"]) == (
        "student",
        [4],
        1,
        None,
    )
    assert provenance["student"] == {
        "method": "f-distill",
        "divergence": "jensen-shannon",
        "teacher": str(tiny_teacher),
        "teacher_guidance": 1.0,
        "iterations": 1,
        "ema": "sigma_rel=0.1",
        "seed": 3,
    }
    assert provenance["resolution"] == "8x8"
    with pytest.warns(UserWarning, match="20 images"):
        provenance = evaluate(tiny_teacher, num_steps=2, **how)["provenance"]
    assert (provenance["kind"], provenance["steps"], provenance["sampler"], provenance["guidance"]) == (
        "teacher",
        2,
        "heun",
        1.0,
    )
    assert "student" not in provenance
    assert provenance["extractors"]["digits"].keys() == {"sha256", "published", "preparation"}


def test_captions_are_a_prompt_each_for_protocols_that_draw_each_once(tmp_path: Path) -> None:
    samples = write(tmp_path / "samples", noise(3, 0))
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    for protocol in ("coco30k-dmd2", "folder"):  # a list that is too short is not begun again
        with pytest.raises(ArgumentError, match=r"prompts: 2 in .* for 3 images; expected one for each"):
            evaluate(samples, protocol=protocol, metrics=["clip"], prompts=file)
