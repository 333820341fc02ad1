"""Whole checkpoints of Stable Diffusion 1, 2 and XL: network, text encoders and autoencoder in one file.

ComfyUI recognises these models by their tensors' names, and by marks such as a size or the mark of a v-prediction; the
marks here follow its `supported_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.base.errors import CheckpointError
from fdistill.formats.comfy.autoencoder import original_autoencoder
from fdistill.formats.comfy.text_encoders import original_clip, original_open_clip
from fdistill.formats.pipeline_folder import components, read_config, read_weights

#: ComfyUI takes an SD2 network for a v-prediction if the standard deviation of this tensor is above the threshold.
_V_PREDICTION_TENSOR = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_PREDICTION_STD = 0.09
#: The scaling_factor that ComfyUI takes for granted: of Stable Diffusion 1 and 2, and of XL.
_SCALES = (0.18215, 0.13025)
_SAMPLING_NODE = "put a ModelSamplingDiscrete node with sampling=v_prediction behind the loader"
#: (channels of the first resolution, width of the text embeddings) of the UNets that ComfyUI recognises.
_KNOWN_UNETS = {(320, 768), (320, 1024), (320, 2048)}


def whole_checkpoint(folder: Path, network: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """See `Family.comfy_checkpoint`.

    Raises:
        CheckpointError: weights cannot be read, or the scheduler's prediction type is neither epsilon nor v_prediction.
    """
    parts, config = components(folder), read_config(folder / "unet" / "config.json")
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"{folder}: ComfyUI's checkpoints predict eps or v, but this student predicts {prediction!r}"
        )
    made = network | _prefixed("first_stage_model.", original_autoencoder(read_weights(folder / "vae")))
    made |= _text_encoders(folder, parts, config)
    notes = _predicts_v(made, parts, config, scheduler) if prediction == "v_prediction" else []
    notes += _scaled_otherwise(folder, parts)
    if (config["block_out_channels"][0], config["cross_attention_dim"]) not in _KNOWN_UNETS:
        notes.append("ComfyUI recognises only the published sizes of this UNet, and will not recognise this one")
    return made, notes


def _scaled_otherwise(folder: Path, parts: Mapping[str, str]) -> list[str]:
    """A note if ComfyUI, which does not read the scale of latents, would decode other images."""
    config, expected = read_config(folder / "vae" / "config.json"), _SCALES["text_encoder_2" in parts]
    found = {name: config.get(name) for name in ("latents_mean", "latents_std") if config.get(name) is not None}
    scale = config.get("scaling_factor", _SCALES[False])
    if scale == expected and not found:
        return []
    return [
        f"ComfyUI decodes latents of scaling_factor {expected}, but this student's have "
        f"{', '.join(f'{name} {value}' for name, value in {'scaling_factor': scale, **found}.items())}: decode them "
        "with diffusers"
    ]


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
    made: dict[str, Tensor], parts: Mapping[str, str], config: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> list[str]:
    """Marks a v-prediction if ComfyUI has a mark for it; otherwise returns a note if it would be taken for eps."""
    if "text_encoder_2" in parts:
        made["v_pred"] = torch.zeros(1)
        if scheduler.get("rescale_betas_zero_snr"):
            made["ztsnr"] = torch.zeros(1)
        return []
    judged = made.get(_V_PREDICTION_TENSOR) if config.get("use_linear_projection") else None
    if judged is not None and judged.float().std(correction=0) > _V_PREDICTION_STD:
        return []
    noise = ", with zsnr=true" if scheduler.get("rescale_betas_zero_snr") else ""
    return [f"ComfyUI will take this v-prediction for eps: {_SAMPLING_NODE}{noise}"]
