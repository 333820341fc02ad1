"""Checkpoints as denoisers: a file for each family, and the only place that knows eps from v."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import diffusers
from torch import nn

from fdistill.adapters import dit, edm, edm2, flux, pixart, sana, sd3, unet2d, unet2d_condition
from fdistill.adapters.family import Family
from fdistill.adapters.original_names import Layout
from fdistill.base.errors import CheckpointError
from fdistill.denoiser import Denoiser

#: Network class in a checkpoint's config.json -> its family.
FAMILIES: dict[str, Family] = {
    "UNet2DModel": unet2d.FAMILY,
    "UNet2DConditionModel": unet2d_condition.FAMILY,
    "SD3Transformer2DModel": sd3.FAMILY,
    "FluxTransformer2DModel": flux.FAMILY,
    "PixArtTransformer2DModel": pixart.FAMILY,
    "SanaTransformer2DModel": sana.FAMILY,
    "DiTTransformer2DModel": dit.FAMILY,
    "EDMNetwork": edm.FAMILY,
    "EDM2Network": edm2.FAMILY,
}
if hasattr(diffusers, "QwenImageTransformer2DModel"):  # since 0.35
    from fdistill.adapters import qwen_image

    FAMILIES["QwenImageTransformer2DModel"] = qwen_image.FAMILY

#: Names of the classes of pipelines that are ours, as model_index.json has them: students that no class of diffusers
#: runs, and students with one encoder and several decoders.
ONE_STEP, TIUE = "OneStepPipeline", "TiUEPipeline"
OWN_PIPELINES = (ONE_STEP, TIUE)


def family_of(network: nn.Module) -> Family:
    """The family of a network; KeyError where its class is of none."""
    return FAMILIES[type(network).__name__]


def supported_pipelines() -> list[str]:
    """The text-to-image pipelines of diffusers that are read."""
    return [name for family in FAMILIES.values() if family.text is not None for name in family.text.pipelines]


def wrap(network: nn.Module, scheduler: Mapping[str, Any] | None) -> Denoiser:
    """The denoiser of a network of a known family, with the config of the scheduler that its pipeline has."""
    return family_of(network).wrap(network, scheduler)


def original_layout(class_name: str, names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """A network's tensors under the names of its publisher, see `Family`; None where these are not known.

    Raises:
        CheckpointError: a tensor has no name there.
    """
    family = FAMILIES.get(class_name)
    return None if family is None or family.original_layout is None else family.original_layout(names, config)


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
