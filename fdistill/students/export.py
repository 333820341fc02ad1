"""A student in the formats of other programs: a LoRA file, or one file with ComfyUI's tensor names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import atomic_file, check_file
from fdistill.formats.comfy import single_file
from fdistill.formats.lora_file import LORA_FILE, kohya_names
from fdistill.formats.pipeline_folder import read_tensors

FORMATS = ("lora", "comfy", "comfy-lora")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def export_student(student: Path, format: str, output: Path, dtype: str | None = None) -> list[str]:
    """Writes a student folder as one safetensors file.

    Args:
        student: the folder of a student's pipeline.
        format: "lora", the adapters as `load_lora_weights` of diffusers reads them; "comfy-lora", the same under the
            names that ComfyUI reads; "comfy", all weights under ComfyUI's names, adapters merged.
        output: a .safetensors file.
        dtype: "fp16", "bf16" or "fp32" for all weights; None leaves them as they are.

    Returns:
        What to know before using the file, a sentence each.

    Raises:
        ArgumentError: another format or dtype, or an output of another kind.
        CheckpointError: no pipeline folder, no adapters where a LoRA is asked for, or a network without names there.
        OutputError: the file cannot be written.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format: got {format!r}; expected {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"dtype: got {dtype!r}; expected {', '.join(DTYPES)}, or none for the student's own")
    if output.suffix != ".safetensors":
        raise ArgumentError(f"output {output}: expected a file name that ends in .safetensors")
    check_file(output)
    if format == "comfy":
        tensors, notes = single_file(student)
    else:
        tensors, notes = _adapters(student), []
        if format == "comfy-lora":
            tensors = _comfy_lora(tensors)
    with atomic_file(output) as temporary:
        save_file(_written(tensors, dtype), temporary, metadata={"format": "pt"})
    return notes


def _adapters(student: Path) -> dict[str, Tensor]:
    path = student / LORA_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{student}: has no {LORA_FILE}: all its weights were trained, which no LoRA holds; train with "
            "student.lora_rank, or export with --format comfy"
        )
    return read_tensors(path)


def _comfy_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI reads diffusers' names of transformers, but of UNets only kohya's."""
    return kohya_names(tensors) if any(name.startswith("unet.") for name in tensors) else tensors


def _written(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    return {
        name: (value if dtype is None or not value.is_floating_point() else value.to(DTYPES[dtype])).contiguous()
        for name, value in tensors.items()
    }
