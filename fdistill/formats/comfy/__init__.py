"""Converts a pipeline folder to one file with the tensor names that ComfyUI and other programs read.

The names are those of each model's publisher. ComfyUI also recognises models by other marks, such as a size or the
mark of a v-prediction; these follow its `supported_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.adapters import FAMILIES, original_layout
from fdistill.adapters.original_names import assemble
from fdistill.base.errors import CheckpointError
from fdistill.formats.comfy.autoencoder import original_autoencoder
from fdistill.formats.comfy.text_encoders import original_clip, original_open_clip
from fdistill.formats.pipeline_folder import components, read_config, read_weights

#: Prefix of the names of the network's tensors.
NETWORK = "model.diffusion_model."
#: ComfyUI takes an SD2 network for a v-prediction if the standard deviation of this tensor is above the threshold.
_V_PREDICTION_TENSOR, _V_PREDICTION_STD = f"{NETWORK}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
_SAMPLING_NODE = "put a ModelSamplingDiscrete node with sampling=v_prediction behind the loader"
#: (channels of the first resolution, width of the text embeddings) of the UNets that ComfyUI recognises.
_KNOWN_UNETS = {(320, 768), (320, 1024), (320, 2048)}


def single_file(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A pipeline folder's tensors under their original names, and notes that a user must read before loading them.

    Stable Diffusion 1, 2 and XL become whole checkpoints (network, text encoders, autoencoder), for ComfyUI's "Load
    Checkpoint". For SD3, Flux, PixArt and Qwen-Image only the network is returned, for "Load Diffusion Model".

    Raises:
        CheckpointError: the folder is not a pipeline folder, its weights cannot be read, the network's original names
            are not known, or ComfyUI does not support the prediction type or the number of output channels.
    """
    parts = components(folder)
    place = next((name for name in ("unet", "transformer") if name in parts), None)
    if place is None:
        raise CheckpointError(f"{folder}: a pipeline without unet or transformer has no ComfyUI format")
    config, weights = read_config(folder / place / "config.json"), read_weights(folder / place)
    layout = original_layout(parts[place], weights, config)
    if layout is None:
        raise CheckpointError(
            f"{folder}: ComfyUI's tensor names of a {parts[place]} are not known to this version; use the folder with "
            "diffusers"
        )
    made = {NETWORK + name: value for name, value in assemble(layout, weights).items()}
    prediction = read_config(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if place == "transformer":
        _check_outputs(folder, parts[place], config)
        return made, ["the file holds the network alone: load it with ComfyUI's Load Diffusion Model (UNETLoader)"]
    if prediction not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"{folder}: ComfyUI's checkpoints predict eps or v, but this student predicts {prediction!r}"
        )
    made |= _prefixed("first_stage_model.", original_autoencoder(read_weights(folder / "vae")))
    made |= _text_encoders(folder, parts, config)
    notes = _predicts_v(made, parts, config, folder) if prediction == "v_prediction" else []
    if (config["block_out_channels"][0], config["cross_attention_dim"]) not in _KNOWN_UNETS:
        notes.append("ComfyUI recognises only the published sizes of this UNet, and will not recognise this one")
    return made, notes


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _text_encoders(folder: Path, parts: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Tensor]:
    first = read_weights(folder / "text_encoder")
    if "text_encoder_2" in parts:
        second = original_open_clip(read_weights(folder / "text_encoder_2"))
        return _prefixed("conditioner.embedders.0.transformer.", original_clip(first)) | _prefixed(
            "conditioner.embedders.1.model.", second
        )
    if config.get("use_linear_projection"):  # as ComfyUI, too, recognises SD2
        return _prefixed("cond_stage_model.model.", original_open_clip(first))
    return _prefixed("cond_stage_model.transformer.", original_clip(first))


def _predicts_v(
    made: dict[str, Tensor], parts: Mapping[str, str], config: Mapping[str, Any], folder: Path
) -> list[str]:
    """Marks a v-prediction if ComfyUI has a mark for it; otherwise returns a note if it would be taken for eps."""
    if "text_encoder_2" in parts:
        made["v_pred"] = torch.zeros(1)
        if read_config(folder / "scheduler" / "scheduler_config.json").get("rescale_betas_zero_snr"):
            made["ztsnr"] = torch.zeros(1)
        return []
    judged = made.get(_V_PREDICTION_TENSOR) if config.get("use_linear_projection") else None
    if judged is not None and judged.float().std(correction=0) > _V_PREDICTION_STD:
        return []
    return [f"ComfyUI will take this v-prediction for eps: {_SAMPLING_NODE}"]


def _check_outputs(folder: Path, class_name: str, config: Mapping[str, Any]) -> None:
    outputs = config.get("out_channels")
    if FAMILIES[class_name].original_variances and outputs != 2 * config["in_channels"]:
        raise CheckpointError(
            f"{folder}: ComfyUI's {class_name.removesuffix('Transformer2DModel')} has twice as many output as input "
            f"channels, but this student has {outputs}; use the folder with diffusers"
        )
