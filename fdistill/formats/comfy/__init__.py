"""Converts a pipeline folder to one file with the tensor names that ComfyUI and other programs read.

The names are those of each model's publisher.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import Tensor

from fdistill.adapters import FAMILIES, network_components, original_layout
from fdistill.adapters.original_names import assemble
from fdistill.adapters.variances import with_variances
from fdistill.base.errors import CheckpointError
from fdistill.formats.pipeline_folder import components, read_config, read_weights

#: Prefix of the names of the network's tensors.
NETWORK = "model.diffusion_model."


def single_file(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A pipeline folder's tensors under their original names, and notes that a user must read before loading them.

    Families with a `comfy_checkpoint` become whole checkpoints (network, text encoders, autoencoder), for ComfyUI's
    "Load Checkpoint". For other families only the network is returned, for "Load Diffusion Model".

    Raises:
        CheckpointError: the folder is not a pipeline folder, its weights cannot be read, the network's original names
            are not known, or ComfyUI does not support the prediction type.
    """
    parts = components(folder)
    place = next((name for name in network_components() if name in parts), None)
    if place is None:
        raise CheckpointError(f"{folder}: a pipeline without {' or '.join(network_components())} has no ComfyUI format")
    config, weights = read_config(folder / place / "config.json"), read_weights(folder / place)
    layout = original_layout(parts[place], weights, config)
    if layout is None:
        raise CheckpointError(
            f"{folder}: ComfyUI's tensor names of a {parts[place]} are not known to this version; use the folder with "
            "diffusers"
        )
    family = FAMILIES[parts[place]]
    if family.original_variances and config["out_channels"] != 2 * config["in_channels"]:
        weights = with_variances(weights, family.original_variances, config["in_channels"])
    network = {NETWORK + name: value for name, value in assemble(layout, weights).items()}
    whole = family.comfy_checkpoint
    if whole is not None:
        module, _, function = whole.partition(":")
        made: tuple[dict[str, Tensor], list[str]] = getattr(importlib.import_module(module), function)(folder, network)
        return made
    return network, ["the file holds the network alone: load it with ComfyUI's Load Diffusion Model (UNETLoader)"]
