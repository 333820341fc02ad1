"""The autoencoders of PixArt, Sana, Qwen-Image, Z-Image and FLUX.2 as their pipelines use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.parametrisation import student_scheduler
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.teachers.autoencoder import LatentSpace, attach_latent_space
from support.text_families import sd3, sd15, sdxl
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_pipelines import denoiser_of, load_pipeline

FAMILIES = [name for name in TEXT_FAMILIES_DIT if name not in ("pixart-alpha", "sana-timestep-scale", "flux2-dev")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("text")
    return {name: TEXT_FAMILIES_DIT[name][0](base / name) for name in FAMILIES}


def latent_space(folder: Path, denoiser: TextDenoiser, vae: str | None = None) -> LatentSpace:
    found = attach_latent_space(denoiser, Checkpoint(str(folder), folder), vae)
    assert found is not None
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_images_and_latents(name: str, folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(folders[name])
    denoiser = denoiser_of(pipeline)
    space = latent_space(folders[name], denoiser)
    vae: Any = pipeline.vae
    factor = {"sana": 4, "lumina2": 8}.get(name, 2)
    assert space.factor == factor == pipeline.vae_scale_factor * (2 if name == "flux2-klein" else 1)
    images = torch.rand(3, 3, 32, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std = space.moments(images).chunk(2, dim=1)
    assert mean.shape == (3, denoiser.sample_shape[0], 32 // factor, 16 // factor)
    with torch.no_grad():
        if name == "sana":
            torch.testing.assert_close(mean, vae.encode(images).latent)
            assert not std.any()
            seen = mean * 0.41
        elif name == "qwen-image":
            posterior = vae.encode(images.unsqueeze(2)).latent_dist
            torch.testing.assert_close(mean, posterior.mode().squeeze(2))
            torch.testing.assert_close(std, posterior.logvar.div(2).exp().squeeze(2))
            means, stds = (torch.tensor(vae.config[f"latents_{part}"]).reshape(1, 4, 1, 1) for part in ("mean", "std"))
            seen = (mean - means) / stds
        elif name == "flux2-klein":
            posterior = vae.encode(images).latent_dist
            torch.testing.assert_close(mean, pipeline._patchify_latents(posterior.mode()))
            torch.testing.assert_close(std, pipeline._patchify_latents(posterior.std))
            seen = pipeline._encode_vae_image(images, None)
            assert (seen - mean).abs().mean() > 0.1
            mean = posterior.mode()
        else:
            torch.testing.assert_close(mean, vae.encode(images).latent_dist.mode())
            seen = (mean - 0.06) * 1.5 if name in ("z-image", "lumina2") else mean * 0.5
        again = vae.decode(mean.unsqueeze(2)).sample.squeeze(2) if name == "qwen-image" else vae.decode(mean).sample
    samples = space.scaling.to_samples(space.moments(images).chunk(2, dim=1)[0])
    assert denoiser.latent_scaling == space.scaling
    torch.testing.assert_close(samples, seen)
    torch.testing.assert_close(space.decode(samples), again, rtol=1e-4, atol=1e-5)


def test_large_images_visit_the_autoencoder_a_few_at_a_time(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(folders["sana"])
    space = latent_space(folders["sana"], denoiser_of(pipeline))
    images = torch.rand(5, 3, 32, 32)
    whole = space.moments(images)
    pictures = space.decode(whole[:, :8])
    monkeypatch.setattr("fdistill.teachers.autoencoder._PIXELS", 2 * 32 * 32)
    sizes: list[int] = []
    for half in (space.vae.encoder, space.vae.decoder):
        half.register_forward_pre_hook(lambda _module, given: sizes.append(len(given[0])))
    torch.testing.assert_close(space.moments(images), whole)
    torch.testing.assert_close(space.decode(whole[:, :8]), pictures)
    assert sizes == [2, 2, 1, 2, 2, 1]


def test_autoencoders_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    denoiser = denoiser_of(load_pipeline(folders["sana"]))
    with pytest.raises(CheckpointError, match="has latents of 4 channels"):
        latent_space(folders["sana"], denoiser, str(folders["pixart"]))
    tiny_folder = tmp_path / "tiny"
    tiny_folder.mkdir()
    (tiny_folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(CheckpointError, match=r"'AutoencoderTiny' is not supported.*AutoencoderDC, AutoencoderKL"):
        latent_space(folders["sana"], denoiser, str(tiny_folder))
    (tiny_folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected the config of an autoencoder"):
        latent_space(folders["sana"], denoiser, str(tiny_folder))
    (tiny_folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="expected the config of an autoencoder"):
        latent_space(folders["sana"], denoiser, str(tiny_folder))


MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]  # Playground v2.5's


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_statistics_of_latents_are_read_as_the_pipeline_reads_them(tmp_path: Path) -> None:
    folder = with_config(sdxl(tmp_path / "sdxl"), latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    pipeline = load_pipeline(folder)
    space = latent_space(folder, denoiser_of(pipeline))
    assert space.scaling.scale == tuple(0.5 / std for std in STD)
    assert space.scaling.bias == pytest.approx(tuple(-0.5 * mean / std for mean, std in zip(MEAN, STD, strict=True)))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipeline.scheduler, call = student_scheduler(denoiser_of(pipeline).parametrisation, [999.0]) or (None, {})
    call |= {"latents": latents, "height": 16, "width": 16, "guidance_scale": 0.0}
    drawn = pipeline(["a", "b"], output_type="latent", **call).images
    pixels = pipeline(["a", "b"], output_type="pt", **call).images
    found = space.decode(drawn).div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(found, pixels, rtol=0, atol=1e-5)
    assert pixels.std() > 0.05


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (
            sd15,
            {"latents_mean": MEAN, "latents_std": STD},
            r"latents_mean \[.*StableDiffusionPipeline does not read it",
        ),
        (sdxl, {"shift_factor": 0.1}, r"shift_factor 0\.1: StableDiffusionXLPipeline does not read it.*expected null"),
        (sdxl, {"latents_mean": MEAN}, "expected latents_mean and latents_std"),
        (sdxl, {"latents_mean": MEAN, "latents_std": STD[:3]}, "expected 4 numbers each"),
        (sdxl, {"latents_mean": MEAN, "latents_std": [*STD[:3], 0]}, "the latter above 0"),
        (sd3, {"latents_mean": MEAN * 4, "latents_std": STD * 4}, "StableDiffusion3Pipeline does not read it"),
    ],
)
def test_statistics_that_the_pipeline_does_not_read_are_refused(
    write: Callable[[Path], Path], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "teacher")
    denoiser = denoiser_of(load_pipeline(folder))
    with pytest.raises(CheckpointError, match=message):
        latent_space(with_config(folder, **changes), denoiser)
