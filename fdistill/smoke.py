"""What `--smoke` puts in place of a recipe's teacher and data, so that the recipe runs anywhere within a minute."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from fdistill import __version__
from fdistill.adapters import FAMILIES, load_denoiser, resolve_checkpoint
from fdistill.adapters.parametrisation import load_scheduler
from fdistill.caching import cache
from fdistill.config import DistillConfig, SmokeConfig, load_config, load_smoke
from fdistill.data.teacher_samples import cache_folder
from fdistill.errors import ConfigError, did_you_mean
from fdistill.files import atomic_folder
from fdistill.latents import attach_latent_space

#: Settings of every smoke run: over the recipe's, under those of its smoke section.
SETTINGS: dict[str, Any] = {
    "iterations": 3,
    "batch_size": 4,
    "images.workers": 1,
    "log.every": 1,
    "log.samples_every": 0,
    "log.checkpoint_every": 0,
    "log.tracker": "none",
}


def smoke_config(name_or_path: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> DistillConfig:
    """A recipe for a few iterations on a tiny untrained teacher of its architecture and on random images.

    Both are made once, from the recipe's smoke section, in $FDISTILL_CACHE. Arguments as in `load_config`.

    Raises:
        ConfigError: the config has no smoke section, or one of which no network can be built.
        OutputError: the cache folder cannot be written.
    """
    recipe, section = load_config(name_or_path).images.recipe, load_smoke(name_or_path)
    key = json.dumps([__version__, recipe, section.model_dump()], sort_keys=True)
    name = f"{Path(name_or_path).stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = cache_folder() / "smoke" / name
    if not folder.is_dir():
        own = folder.with_name(f"{name}.{uuid.uuid4().hex}")  # another process may be making the same
        with atomic_folder(own) as temporary:
            _write(temporary, section, recipe, name_or_path)
        try:
            own.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(own)
    made = {"teacher": str(folder / "teacher"), "data": str(folder / "data"), **SETTINGS, **section.overrides}
    if isinstance(overrides, Mapping):
        return load_config(name_or_path, {**made, **overrides})
    return load_config(name_or_path, [*(f"{key}={json.dumps(value)}" for key, value in made.items()), *overrides])


def _write(folder: Path, section: SmokeConfig, recipe: str, where: str) -> None:
    """teacher/, and data/: images, or what the teacher's autoencoder makes of them."""
    teacher, images = folder / "teacher", folder / "images"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            network = _network(section.network)
            vae = section.vae and AutoencoderKL(**section.vae)
            scheduler = load_scheduler(section.scheduler)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"config {where!r}: nothing can be built from its smoke section ({error}); expected settings of a "
                "network in it, and of the scheduler and vae if the teacher has them"
            ) from error
    for part, component in (("network", network), ("vae", vae), ("scheduler", scheduler)):
        if component:
            component.save_pretrained(teacher / part)
    checkpoint = resolve_checkpoint(teacher)
    denoiser = load_denoiser(checkpoint)
    latents = attach_latent_space(denoiser, checkpoint, None)
    size = denoiser.sample_shape[-1] * (latents.factor if latents else 1)
    mode = "L" if denoiser.sample_shape[0] == 1 else "RGB"
    width = size if latents is None and recipe == "exact" else size + size // 4  # otherwise there is a side to cut off
    _write_images(images, section.images, denoiser.num_classes or 1, mode, (width, size))
    if latents is None:
        images.rename(folder / "data")
    else:
        cache(images, teacher=teacher, output=folder / "data", workers=1, device="cpu")
        shutil.rmtree(images)


def _network(settings: Mapping[str, Any]) -> Any:
    """An untrained network, in which no layer is all zeros: else its output would not depend on its input."""
    arguments = dict(settings)
    name = str(arguments.pop("_class_name", None))
    if name not in FAMILIES:
        raise ValueError(f"network._class_name: got {name!r}; {did_you_mean(name, FAMILIES)}")
    network: nn.Module = FAMILIES[name].NETWORK(**arguments)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def _write_images(folder: Path, count: int, classes: int, mode: str, size: tuple[int, int]) -> None:
    """Coarse random images, as PNG in a folder for each class."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i % classes:04d}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).resize(size).save(path)
