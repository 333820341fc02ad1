"""Preference models against other computations of the same, on tiny random networks of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from evaluation.evaluate import evaluate
from evaluation.extractors import open_text_image_model
from evaluation.metrics.pairs import pairs_picture
from evaluation.metrics.preference import preference_score
from fdistill.base.errors import ArgumentError, CheckpointError
from support.preference import pictures, tiny_hps, tiny_pickscore

CPU = torch.device("cpu")
PROMPTS = ["a bold handwritten seven", "two cats on a mat, " * 40]


@pytest.fixture
def hps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    return tiny_hps(tmp_path, monkeypatch)


@pytest.fixture
def pickscore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    return tiny_pickscore(tmp_path, monkeypatch)


def scores(name: str, path: Path, images: Tensor) -> Tensor:
    model = open_text_image_model(name, CPU, {name: path})
    return (model.extractor.run(images)["image"] * model.encode_prompts(PROMPTS)).sum(1)


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 80), (32, 20)])
def test_hps_is_open_clips_model_with_its_longest_resizing(shape: tuple[int, int], hps: tuple[Path, Any]) -> None:
    """torchvision resizes the float tensor, and pads it, as HPSv2's ResizeMaxSize does."""
    from torchvision.transforms import InterpolationMode, Normalize
    from torchvision.transforms import functional as T

    path, model = hps
    images = pictures(*shape)
    pixels = images.float() / 255
    scale = 32 / max(shape)
    sides = [round(side * scale) for side in shape]
    pixels = T.resize(pixels, sides, InterpolationMode.BICUBIC, antialias=True)
    high, wide = 32 - sides[0], 32 - sides[1]
    pixels = T.pad(pixels, [wide // 2, high // 2, wide - wide // 2, high - high // 2])
    normalised = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)(pixels)
    with torch.no_grad():
        image, text, _ = model(normalised, open_clip.get_tokenizer("ViT-B-32")(PROMPTS))
    expected = 100 * (image * text).sum(1)
    torch.testing.assert_close(scores("hps21", path, images), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(32, 32), (48, 80)])
def test_pickscore_is_the_models_own_logit(shape: tuple[int, int], pickscore: tuple[Path, Any]) -> None:
    """By the model's forward pass, on pixels that Pillow has resized; the text ends at its first end token."""
    path, model = pickscore
    images = pictures(*shape)
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(each.permute(1, 2, 0).numpy())) for each in images])
    tokens = open_clip.get_tokenizer("ViT-B-32")(PROMPTS)
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=pixels).logits_per_image.diagonal()
    torch.testing.assert_close(scores("pickscore", path, images), expected, rtol=1e-4, atol=1e-3)


def test_the_score_is_the_mean_with_its_standard_error() -> None:
    image, text = torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = preference_score(image, text)
    assert (found.value, found.spread) == (pytest.approx(4), pytest.approx(1))
    with pytest.raises(ArgumentError, match="one prompt for each image, got 2 images and 1 prompts"):
        preference_score(image, text[:1])


def test_the_protocol_scores_a_folder(hps: tuple[Path, Any], pickscore: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    images = pictures(32, 32)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")
    (folder / "manifest.json").write_text(json.dumps({"prompts": [prompt.strip() for prompt in PROMPTS]}))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    weights = {"hps21": hps[0], "pickscore": pickscore[0]}
    result = evaluate(
        folder,
        protocol="few-step-t2i",
        prompts=tmp_path / "prompts.txt",
        reference=folder,
        output=tmp_path / "scores.json",
        metrics=["hpsv2.1", "pickscore"],
        weights=weights,
        device="cpu",
    )
    for name, model in (("hpsv2.1", "hps21"), ("pickscore", "pickscore")):
        (key,) = (key for key in result["metrics"] if key.startswith(name))
        assert "other weights" in key
        assert (tmp_path / f"scores.{name}.png").is_file()
        assert result["metrics"][key] == pytest.approx(scores(model, weights[model], images).mean().item(), abs=1e-3)


def test_without_weights_it_says_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"hps21: its weights HPS_v2.1_compressed.pt are not here .*xswu/HPSv2"):
        open_text_image_model("hps21", CPU, {})


def test_weights_of_another_network_are_refused(hps: tuple[Path, Any], pickscore: tuple[Path, Any]) -> None:
    other = hps[0].with_suffix(".safetensors")
    save_file({name: value.contiguous() for name, value in hps[1].state_dict().items()}, other)
    for name, path in (("pickscore", other), ("hps21", pickscore[0])):
        with pytest.raises(CheckpointError, match=r"is of another architecture .*expected the weights as published"):
            open_text_image_model(name, CPU, {name: path})


class Shown:
    """Images of one colour each, and their prompts."""

    def __init__(self, colours: list[int], prompts: list[str] | None):
        self.colours, self.prompts = colours, prompts

    def read(self, indices: list[int]) -> Tensor:
        return torch.stack([torch.full((3, 400, 384), self.colours[i], dtype=torch.uint8) for i in indices])


def test_the_picture_has_the_best_the_median_and_the_worst_beside_the_teachers() -> None:
    prompts = ["a cat", "the moon " * 60, "a house", "a dog"]
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1])

    def drawn(reference: Shown | None) -> Image.Image | None:
        measured: Any = SimpleNamespace(images=Shown([10, 20, 30, 40], prompts), reference_images=reference)
        return pairs_picture(scores, measured)

    picture = drawn(Shown([110, 120, 130, 140], list(prompts)))
    assert picture is not None
    pixels, height = np.asarray(picture)[..., 0], picture.height // 3
    rows = [[int(pixels[row * height + 300, x]) for x in (100, 500)] for row in range(3)]
    assert rows == [[130, 30], [140, 40], [120, 20]]
    assert all((pixels[row * height : row * height + 50] < 128).any() for row in range(3))
    for other in (None, Shown([0] * 4, None), Shown([0] * 4, prompts[::-1])):
        assert drawn(other) is None
