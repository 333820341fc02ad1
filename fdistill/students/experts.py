"""The experts of a phased student in its folder: the base's pipeline, and a LoRA file for each phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.adapters import family_of
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.denoiser import Denoiser
from fdistill.formats.lora_file import save_lora
from fdistill.formats.pipeline_folder import read_tensors
from fdistill.student_kinds import STUDENT_FILE
from fdistill.students.lora import STUDENT, lora_copy
from fdistill.students.phases import PhasedGenerator, Phases

EXPERT = "phase-{}.safetensors"  # phases are counted from 1, as people do


def save_experts(student: PhasedGenerator, folder: Path) -> None:
    """Writes the adapters of each expert, as diffusers' `load_lora_weights` reads them."""
    for number, expert in enumerate(student.denoisers, 1):
        save_lora(expert.network, folder / EXPERT.format(number), family_of(expert.network).component)


def experts_in(folder: Path) -> list[Path]:
    """The files of a folder's experts, first phase first; none in a folder of another student."""
    return sorted(folder.glob(EXPERT.format("[1-9]")))


def load_phased(
    base: Denoiser, folder: Path, facts: Mapping[str, Any], levels: Sequence[float] | None = None
) -> PhasedGenerator:
    """The student of a folder with experts, on the base that the folder holds.

    Args:
        facts: what the folder's fdistill_student.json says.
        levels: to sample at; None for those that the experts were trained at.

    Raises:
        CheckpointError: the experts' files are missing, damaged or of another network.
    """
    phases = phases_in(folder, facts)
    *earlier, last = [load_expert(base, path) for path in experts_in(folder)]
    return PhasedGenerator(last, phases, earlier, levels)


def phases_in(folder: Path, facts: Mapping[str, Any]) -> Phases:
    """The phases of a folder's student; CheckpointError where its file does not say them, or the files do not fit."""
    try:
        phases, levels = Phases.from_settings(facts["phases"]), tuple(float(level) for level in facts["levels"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / STUDENT_FILE}: cannot be read ({error!r}); copy the folder again") from error
    count = len(experts_in(folder))
    if not 0 < count <= len(phases.starts) or phases.until(count - 1) != levels:
        raise CheckpointError(
            f"{folder}: has {count} files {EXPERT.format('N')}, which are not the phases at its levels "
            f"{list(levels)}; copy the folder again"
        )
    return phases


def load_expert(base: Denoiser, path: Path) -> Denoiser:
    """A frozen copy of `base` that shares its weights, with the adapters of a file that `save_experts` wrote.

    Raises:
        CheckpointError: the file is damaged, or of another network.
    """
    prefix = f"{family_of(base.network).component}."
    tensors = {name.removeprefix(prefix): value for name, value in read_tensors(path).items()}
    down = {name.removesuffix(".lora_A.weight"): value for name, value in tensors.items() if ".lora_A." in name}
    if not down:
        raise CheckpointError(f"{path}: holds no adapters; expected what a phase's run wrote")
    targets = [f"network.{layer}" for layer in down]
    try:
        expert = lora_copy(base, len(next(iter(down.values()))), adapter=STUDENT, targets=targets)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    own = {
        name.removeprefix("network.").replace(f".{STUDENT}.", "."): parameter
        for name, parameter in expert.named_parameters()
        if ".lora_" in name
    }
    _check_alike(path, own, tensors)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return expert.eval().requires_grad_(False)


def _check_alike(path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(own.keys() | tensors.keys()):
        mine = tuple(own[name].shape) if name in own else None
        found = tuple(tensors[name].shape) if name in tensors else None
        if mine != found:
            raise CheckpointError(
                f"{path}: {name} has shape {found}, and this network takes {mine}; expected the adapters of a phase "
                "that was trained on the same teacher"
            )
