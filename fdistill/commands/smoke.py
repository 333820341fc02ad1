"""For `--smoke`: a tiny teacher and data in place of a recipe's, so that the recipe runs anywhere within a minute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from fdistill import __version__
from fdistill.adapters import FAMILIES
from fdistill.adapters.checkpoint import load_denoiser, resolve_checkpoint
from fdistill.adapters.parametrisation import load_scheduler
from fdistill.adapters.tiny_parts import untrained
from fdistill.base.errors import ConfigError, did_you_mean
from fdistill.base.files import made_once
from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.config.reading import load_config, load_smoke
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import SmokeConfig
from fdistill.data import TEACHER_SAMPLES
from fdistill.teachers.autoencoder import attach_latent_space, image_size
from fdistill.training.cache import cache

__all__ = ["smoke_config"]

#: Settings of every smoke run. They replace the recipe's; those of its smoke section replace these.
SETTINGS: dict[str, Any] = {
    "iterations": 3,
    "batch_size": 4,
    "images.workers": 1,
    "log.every": 1,
    "log.samples_every": 0,
    "log.checkpoint_every": 0,
    "log.tracker": "none",
}
_PROMPTS = "prompts.txt"
_CAPTIONS = ("a bold seven", "a thin digit", "a red house by the sea", "two cats on a chair, in the evening")


def smoke_config(name_or_path: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> DistillConfig:
    """A recipe's config for a few iterations with a tiny untrained teacher of the same architecture.

    The data are random images, or prompts alone for a recipe that reads no images. Teacher and data are made once, from
    the recipe's smoke section, in $FDISTILL_CACHE. The arguments are those of `load_config`.

    Raises:
        ConfigError: the config has no smoke section, or no network can be built from it.
        OutputError: the cache folder cannot be written.
    """
    section = load_smoke(name_or_path)
    given = dict(overrides) if isinstance(overrides, Mapping) else list(overrides)
    made: dict[str, Any] = {**SETTINGS, **section.overrides}
    if stages := load_config(name_or_path, given).stages:
        del made["iterations"]
        made["stages"] = [_of_one_iteration(stage) for stage in stages]
    config = load_config(name_or_path, _under(made, given))
    key = {
        "version": __version__,
        "section": section.model_dump(mode="json"),
        "encoding": _encoding(config),
        "reads_images": _reads_images(config),
    }
    folder = made_once("smoke", key, partial(_write, section=section, config=config, where=name_or_path))
    read = {"prompts": str(folder / _PROMPTS)} if (folder / _PROMPTS).is_file() else {"data": str(folder / "data")}
    return load_config(name_or_path, _under({"teacher": str(folder / "teacher"), **read, **made}, given))


def _of_one_iteration(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The stage with one iteration, in which no rate can warm up."""
    changes = {
        key: {**value, "lr_warmup": 0} if isinstance(value, Mapping) and "lr_warmup" in value else value
        for key, value in stage.items()
    }
    return {**changes, "iterations": 1}


def _under(made: Mapping[str, Any], given: Mapping[str, Any] | list[str]) -> Mapping[str, Any] | list[str]:
    if isinstance(given, Mapping):
        return {**made, **given}
    return [*(f"{key}={json.dumps(value)}" for key, value in made.items()), *given]


def _encoding(config: DistillConfig) -> list[Any]:
    """The settings that the encoded images and captions depend on."""
    return [config.images.recipe, config.resolution, config.negative_prompt, config.encoder_precision]


def _reads_images(config: DistillConfig) -> bool:
    return config.data not in (None, TEACHER_SAMPLES)


def _write(folder: Path, section: SmokeConfig, config: DistillConfig, where: str) -> None:
    """Writes teacher/, and the data of a run: prompts.txt, or data/ with images or encoded latents."""
    teacher, images = folder / "teacher", folder / "images"
    try:
        components = _components(section)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"config {where!r}: nothing can be built from its smoke section ({error}); expected settings of a "
            "network in it, and of the scheduler and vae if the teacher has them; or a pipeline"
        ) from error
    for part, component in components.items():
        component.save_pretrained(teacher / part)
    checkpoint = resolve_checkpoint(teacher)
    denoiser = load_denoiser(checkpoint)
    if denoiser.text_shapes is not None and not _reads_images(config):
        (folder / _PROMPTS).write_text("\n".join(_CAPTIONS) + "\n", encoding="utf-8")
        return
    latents = attach_latent_space(denoiser, checkpoint, None)
    size = config.resolution or image_size(denoiser, latents)
    mode = "L" if denoiser.sample_shape[0] == 1 else "RGB"
    exact = latents is None and config.images.recipe == "exact"
    width = size if exact else size + size // 4  # otherwise images are wider than high, so that they have to be cropped
    _write_images(images, section.images, denoiser.num_classes or 1, mode, (width, size))
    if denoiser.text_shapes is not None:
        for i, image in enumerate(sorted(images.rglob("*.png"))):
            image.with_suffix(".txt").write_text(_CAPTIONS[i % len(_CAPTIONS)], encoding="utf-8")
    if latents is None:
        images.rename(folder / "data")
    else:
        cache(
            images,
            teacher=teacher,
            output=folder / "data",
            workers=1,
            resolution=config.resolution,
            negative_prompt=config.negative_prompt,
            precision=config.encoder_precision,
            device="cpu",
        )
        shutil.rmtree(images)


def _components(section: SmokeConfig) -> dict[str, Any]:
    """The components to save, by sub-folder of the teacher's folder; "." holds a whole pipeline."""
    scheduler = load_scheduler(section.scheduler)
    if section.pipeline is not None:
        return {".": tiny_pipeline(section.pipeline, section.network, scheduler)}
    vae = None if section.vae is None else untrained(partial(AutoencoderKL, **section.vae))
    components = {"network": _network(section.network), "vae": vae, "scheduler": scheduler}
    return {part: component for part, component in components.items() if component is not None}


def _network(settings: Mapping[str, Any]) -> Any:
    arguments = dict(settings)
    name = str(arguments.pop("_class_name", None))
    if name not in FAMILIES:
        raise ValueError(f"network._class_name: got {name!r}; {did_you_mean(name, FAMILIES)}")
    return untrained(lambda: FAMILIES[name].network(**arguments))


def _write_images(folder: Path, count: int, classes: int, mode: str, size: tuple[int, int]) -> None:
    """Writes coarse random images as PNG, in one folder for each class."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i % classes:04d}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).resize(size).save(path)
