"""Checkpoints as denoisers: one file per family, and the only place that knows eps from v."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import diffusers
from torch import nn

from fdistill.adapters import dit, edm, edm2, flux, pixart, sana, sd3, unet2d, unet2d_condition
from fdistill.base.errors import CheckpointError
from fdistill.denoiser import Denoiser

#: Network class in a checkpoint's config.json -> the adapter that reads it.
FAMILIES: dict[str, ModuleType] = {
    "UNet2DModel": unet2d,
    "UNet2DConditionModel": unet2d_condition,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "PixArtTransformer2DModel": pixart,
    "SanaTransformer2DModel": sana,
    "DiTTransformer2DModel": dit,
    "EDMNetwork": edm,
    "EDM2Network": edm2,
}
if hasattr(diffusers, "QwenImageTransformer2DModel"):  # since 0.35
    from fdistill.adapters import qwen_image

    FAMILIES["QwenImageTransformer2DModel"] = qwen_image


def supported_pipelines() -> list[str]:
    """The text-to-image pipelines of diffusers that are read."""
    families = [family for family in FAMILIES.values() if hasattr(family, "PIPELINES")]
    return [pipeline.__name__ for family in families for pipeline in family.PIPELINES]


def wrap(network: nn.Module, scheduler: Mapping[str, Any] | None) -> Denoiser:
    """The denoiser of a network of a known family, with the config of the scheduler that its pipeline has."""
    denoiser: Denoiser = FAMILIES[type(network).__name__].wrap(network, scheduler)
    return denoiser


def set_null_class(denoiser: Denoiser, label: int | None) -> None:
    """Takes the last label for "no class"; nothing happens where that is known, or label is None.

    Raises:
        CheckpointError: another label.
    """
    if label is None or label == denoiser.null_class:
        return
    last = None if denoiser.num_classes is None else denoiser.num_classes - 1
    if denoiser.null_class is not None or label != last:
        known = denoiser.null_class if denoiser.null_class is not None else f"{last}, the last label, or null"
        raise CheckpointError(f"null_class: got {label}; this teacher's can only be {known}")
    denoiser.num_classes = denoiser.null_class = label
