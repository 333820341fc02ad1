"""Checkpoints as denoisers, one file for each family of networks. Only this package handles eps, v and flow outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import diffusers
from torch import nn

from fdistill.adapters import dit, edm, edm2, flux, lumina2, pixart, sana, sd3, unet2d, unet2d_condition
from fdistill.adapters.family import Family
from fdistill.adapters.original_names import Layout
from fdistill.base.errors import CheckpointError
from fdistill.denoiser import Denoiser

__all__ = ["FAMILIES"]

#: Network class, as named in a checkpoint's config.json -> its family.
FAMILIES: dict[str, Family] = {
    "UNet2DModel": unet2d.FAMILY,
    "UNet2DConditionModel": unet2d_condition.FAMILY,
    "SD3Transformer2DModel": sd3.FAMILY,
    "FluxTransformer2DModel": flux.FAMILY,
    "PixArtTransformer2DModel": pixart.FAMILY,
    "SanaTransformer2DModel": sana.FAMILY,
    "Lumina2Transformer2DModel": lumina2.FAMILY,
    "DiTTransformer2DModel": dit.FAMILY,
    "EDMNetwork": edm.FAMILY,
    "EDM2Network": edm2.FAMILY,
}
if hasattr(diffusers, "QwenImageTransformer2DModel"):  # since 0.35
    from fdistill.adapters import qwen_image

    FAMILIES["QwenImageTransformer2DModel"] = qwen_image.FAMILY
if hasattr(diffusers, "ZImageTransformer2DModel"):  # since 0.36
    from fdistill.adapters import z_image

    FAMILIES["ZImageTransformer2DModel"] = z_image.FAMILY
if hasattr(diffusers, "Flux2KleinPipeline"):  # since 0.37
    from fdistill.adapters import flux2

    FAMILIES["Flux2Transformer2DModel"] = flux2.FAMILY

#: Names of fdistill's own pipeline classes that run text-to-image students.
OWN_TEXT_PIPELINES = ("TiUEPipeline",)
#: Name of the network in fdistill's own pipelines, where it is not that of the network's family.
OWN_COMPONENT = "network"


def family_of(network: nn.Module) -> Family:
    """The family of a network; raises KeyError if its class belongs to none."""
    return FAMILIES[type(network).__name__]


def network_components() -> list[str]:
    """The names that networks have in the pipelines of the families, such as unet."""
    return list(dict.fromkeys(family.component for family in FAMILIES.values()))


def supported_pipelines() -> list[str]:
    """Class names of the supported text-to-image pipelines of diffusers."""
    return [name for family in FAMILIES.values() if family.text is not None for name in family.text.pipelines]


def runs_prompts(name: str) -> bool:
    """Whether `name` is a supported pipeline class for text-to-image networks, of diffusers or of fdistill."""
    return name in OWN_TEXT_PIPELINES or name in supported_pipelines()


def guidance_offset(pipeline: str) -> float:
    """The `TextToImage.guidance_offset` of a pipeline class, by its name; 0 for classes of no family."""
    families = (family.text for family in FAMILIES.values() if family.text is not None)
    return next((text.guidance_offset for text in families if pipeline in text.pipelines), 0.0)


def wrap(network: nn.Module, scheduler: Mapping[str, Any] | None) -> Denoiser:
    """Builds the denoiser from a network of a supported family and the config of its pipeline's scheduler."""
    return family_of(network).wrap(network, scheduler)


def original_layout(class_name: str, names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of a network's tensors under its publisher's names, see `Family`; None if these are not known.

    Args:
        class_name: the network's class.
        names: names of its tensors in diffusers.
        config: the network's config.

    Raises:
        CheckpointError: a tensor has no name in the publisher's format.
    """
    family = FAMILIES.get(class_name)
    return None if family is None or family.original_layout is None else family.original_layout(names, config)


def set_null_class(denoiser: Denoiser, label: int | None) -> None:
    """Declares the last label to be "no class". Does nothing if it already is, or if `label` is None.

    Raises:
        CheckpointError: `label` is not the last label, or another label is "no class" already.
    """
    if label is None or label == denoiser.null_class:
        return
    last = None if denoiser.num_classes is None else denoiser.num_classes - 1
    if denoiser.null_class is not None or label != last:
        known = denoiser.null_class if denoiser.null_class is not None else f"{last}, the last label, or null"
        raise CheckpointError(f"null_class: got {label}; this teacher's can only be {known}")
    denoiser.num_classes = denoiser.null_class = label
