"""The CLIP hinge on a tiny open_clip model, against open_clip's own preprocessing and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError
from fdistill.denoiser import LatentScaling
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.training.clip_loss import ClipHinge, load_clip
from support.clip import tiny_clip_file
from support.families import tiny_vae
from support.text_families_dit import HAS_QWEN_IMAGE, deep_compression_vae, video_vae

open_clip: Any = pytest.importorskip("open_clip")

PROMPTS = ["a bold seven", "a thin three", "a horse"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_file(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def hinge(weights: Path) -> ClipHinge:
    return ClipHinge(*load_clip("tiny-fdistill", weights), margin=0.35)


def test_similarity_is_open_clips_own(hinge: ClipHinge, weights: Path) -> None:
    """On images that 8 bits hold, read from PIL by open_clip's own transform."""
    model, _, transform = open_clip.create_model_and_transforms("tiny-fdistill", pretrained=str(weights))
    torch.manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 6), (100, 100), mode="bicubic")
    rough = torch.rand(3, 3, 100, 100)  # which aliases where it is not smoothed before it is scaled
    pixels = (255 * (smooth + rough) / 2).clamp(0, 255).round().byte()
    inputs = torch.stack([transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels])
    with torch.no_grad():
        image = model.encode_image(inputs)
        text = model.encode_text(open_clip.get_tokenizer("tiny-fdistill")(PROMPTS))
        expected = torch.nn.functional.cosine_similarity(image, text)
    features = hinge.encode_prompts(PROMPTS)
    torch.testing.assert_close(features, torch.nn.functional.normalize(text), rtol=1e-5, atol=1e-6)
    similarity = hinge.similarity(pixels / 127.5 - 1, features)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=5e-3)  # PIL rounds the scaled image to 8 bits
    assert expected.std() > 0.02
    # At CLIP's own size nothing is scaled, and nothing rounded.
    with torch.no_grad():
        image = model.encode_image(transform.transforms[-1](pixels[:, :, :32, :32] / 255))
    same = hinge.similarity(pixels[:, :, :32, :32] / 127.5 - 1, features)
    torch.testing.assert_close(same, torch.nn.functional.cosine_similarity(image, text), rtol=1e-5, atol=1e-5)


def test_hinge_stops_at_the_margin(hinge: ClipHinge) -> None:
    torch.manual_seed(1)
    x0 = torch.randn(3, 3, 32, 32, requires_grad=True)
    text = hinge.encode_prompts(PROMPTS)
    similarity = hinge.similarity(x0, text)
    ordered = similarity.detach().sort().values
    hinge.margin = float(ordered[:2].mean())  # one sample is below, two are above
    losses = hinge(x0, text)
    expected = [max(0.0, hinge.margin - value) for value in similarity.tolist()]
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    assert x0.grad is not None
    moved = x0.grad.flatten(1).norm(dim=1) > 0
    assert torch.equal(moved, similarity == ordered[0])


AUTOENCODERS = {"image": tiny_vae, "deep-compression": deep_compression_vae}
if HAS_QWEN_IMAGE:
    AUTOENCODERS["video"] = video_vae


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_gradient_goes_through_the_autoencoder_to_the_latents_alone(kind: str, weights: Path) -> None:
    channels = 8 if kind == "deep-compression" else 4
    scaling = LatentScaling((0.5, 0.6, 0.7, 0.8) * (channels // 4), (0.1, 0.0, -0.1, 0.0) * (channels // 4))
    latents = LatentSpace(AUTOENCODERS[kind](), scaling, "")
    hinge = ClipHinge(*load_clip("tiny-fdistill", weights), latents, margin=2.0)  # always below it
    torch.manual_seed(2)
    x0, text = torch.randn(2, channels, 8, 8, requires_grad=True), hinge.encode_prompts(PROMPTS[:2])
    images = ClipHinge(hinge.clip, hinge.tokenizer, margin=2.0)
    torch.testing.assert_close(hinge(x0, text), images(latents.decode(x0), text), rtol=1e-5, atol=1e-5)
    hinge(x0, text).sum().backward()
    assert x0.grad is not None
    assert (x0.grad.flatten(1).norm(dim=1) > 0).all()
    assert not text.requires_grad
    assert all(p.grad is None for module in (hinge.clip, latents.vae) for p in module.parameters())
    # A step along the gradient brings images nearer to their prompts.
    with torch.no_grad():
        step = 1e-2 * x0.grad / x0.grad.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        assert (hinge(x0 - step, text) < hinge(x0, text)).all()


def test_grey_images_count_as_such(hinge: ClipHinge) -> None:
    grey, text = torch.rand(2, 1, 20, 20) * 2 - 1, hinge.encode_prompts(PROMPTS[:2])
    assert torch.equal(hinge(grey, text), hinge(grey.repeat(1, 3, 1, 1), text))


def test_what_cannot_be_read_is_refused(hinge: ClipHinge, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'ViT-B-32'"):
        load_clip("ViT-B-3", weights)
    with pytest.raises(ConfigError, match=r"clip_loss\.model"):
        load_clip("hf-hub:somebody/some-clip", weights)
    with pytest.raises(CheckpointError, match="no such file"):
        load_clip("tiny-fdistill", tmp_path / "none.safetensors")
    pickle = tmp_path / "tiny.bin"
    torch.save({}, pickle)
    for name in ("openai", pickle):
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            load_clip("tiny-fdistill", name)
    disguised = pickle.rename(tmp_path / "tiny.safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded as tiny-fdistill"):
        load_clip("tiny-fdistill", disguised)
    with pytest.raises(CheckpointError, match="cannot be loaded as RN50"):
        load_clip("RN50", weights)
    with pytest.raises(ArgumentError, match="features of 2 prompts"):
        hinge(torch.zeros(2, 3, 8, 8), hinge.encode_prompts(PROMPTS))
