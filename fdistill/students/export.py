"""A student in the formats of other programs: a LoRA file, or one file with ComfyUI's tensor names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fdistill.adapters.checkpoint import find_network
from fdistill.adapters.parametrisation import parametrisation_from_scheduler, read_scheduler_config
from fdistill.adapters.variances import with_variances
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import atomic_file, check_file
from fdistill.formats.comfy import NETWORK, single_file
from fdistill.formats.comfy.workflow import ComfySampling, workflow
from fdistill.formats.lora_file import LORA_FILE, kohya_names
from fdistill.formats.original_lora import original_lora
from fdistill.formats.pipeline_folder import read_config, read_tensors
from fdistill.noise import FlowSchedule, noise_to_signal
from fdistill.rollout import levels_for
from fdistill.student_kinds import STUDENT_FILE
from fdistill.students.experts import experts_in, phases_in
from fdistill.students.fewer_steps import fewer_steps, said_in_diffusers
from fdistill.students.folder import checked_facts

FORMATS = ("lora", "comfy", "comfy-lora")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def export_student(student: Path, format: str, output: Path, dtype: str | None = None) -> list[str]:
    """Writes a student folder as one safetensors file.

    Args:
        student: the folder of a student's pipeline.
        format: "lora" writes the adapters as diffusers' `load_lora_weights` reads them; "comfy-lora" writes the
            adapters under the names that ComfyUI reads; "comfy" writes all weights under ComfyUI's names, with the
            adapters merged.
        output: a .safetensors file.
        dtype: "fp16", "bf16" or "fp32" for all weights; "fp8", for format "comfy", for the network's matrices, with
            bf16 for everything else; None leaves them as they are.

    A student of several phases becomes a file for each, "<output's name>-phase-1.safetensors" and so on.

    Returns:
        Notes that a user must read before using the file, one sentence each.

    Raises:
        ArgumentError: the format or dtype is unknown, or the output's name does not end in .safetensors.
        CheckpointError: the student is not a pipeline folder, a LoRA format is chosen but the student has no adapters,
            or the format has no names for this network, or none that ComfyUI is known to read.
        OutputError: the file cannot be written.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format: got {format!r}; expected {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"dtype: got {dtype!r}; expected {', '.join(DTYPES)}, or none for the student's own")
    if output.suffix != ".safetensors":
        raise ArgumentError(f"output {output}: expected a file name that ends in .safetensors")
    phases = dict(zip(exported_files(student, output), experts_in(student), strict=False))
    for written in (*(phases or [output]), output.with_suffix(".json")):
        check_file(written)
    if dtype == "fp8" and format != "comfy":
        raise ArgumentError(
            f"dtype: got 'fp8' for format {format}; adapters are small: expected fp16, bf16 or fp32, or format comfy"
        )
    facts = checked_facts(student) if (student / STUDENT_FILE).is_file() else {}
    if format == "comfy" and phases:
        raise ArgumentError(
            f"format: got 'comfy', but {student} has {len(phases)} experts on one base, which are no one network; "
            "expected lora or comfy-lora"
        )
    notes: list[str] = []
    if format == "comfy":
        written_tensors, notes = single_file(student)
        found = {output: written_tensors}
    else:
        found = {made: read_tensors(path) for made, path in phases.items()} or {output: _adapters(student)}
        if format == "comfy-lora":
            found = {made: _comfy_lora(student, tensors) for made, tensors in found.items()}
    for made, tensors in found.items():
        with atomic_file(made) as temporary:
            save_file(_written(tensors, dtype), temporary, metadata={"format": "pt"})
    if format != "comfy" and "teacher_lora" in facts:
        notes.append(_beside(facts, " and ".join(made.name for made in found)))
    if phases:
        notes.append(_one_after_another(student, facts, list(found)))
    if format == "lora":
        return [*notes, *_in_diffusers(student, facts)]
    return [*notes, *_in_comfyui(student, facts, output, adapters=format == "comfy-lora", phases=list(phases))]


def exported_files(student: Path, output: Path) -> list[Path]:
    """The safetensors files that `export_student` writes: the output itself, or one beside it for each expert."""
    return [output.with_name(f"{output.stem}-{path.name}") for path in experts_in(student)] or [output]


def _one_after_another(student: Path, facts: Mapping[str, Any], files: Sequence[Path]) -> str:
    """A sentence that says which file takes which steps."""
    counts = phases_in(student, facts).counts()
    taken, first = [], 1
    for path, count in zip(files, counts, strict=False):
        steps = f"step {first}" if count == 1 else f"steps {first} to {first + count - 1}"
        taken.append(f"{path.name} for {steps}")
        first += count
    return f"load one file at a time, {', '.join(taken)}, as the code in {student / 'README.md'} does"


def _beside(facts: Mapping[str, Any], files: str) -> str:
    """A sentence that says that adapters on a teacher with a LoRA in it need this LoRA as well."""
    name, scale = facts["teacher_lora"], float(facts["teacher_lora_scale"])
    return (
        f"the adapters belong on the base model with {name} in it: load both, {name} with weight {scale:g} and "
        f"{files} with weight 1"
    )


def _in_diffusers(student: Path, facts: Mapping[str, Any]) -> list[str]:
    """A sentence with the scheduler that the student was trained with, and how to call the pipeline.

    Where the teacher takes its guidance scale as an input, adapters work at the one that they were trained with.
    """
    config, call = read_scheduler_config(student), facts.get("call")
    if config is None or not call:
        return []
    guidance = facts.get("embedded_guidance")
    call = {**call, **({} if guidance is None else {"guidance_scale": guidance})}
    arguments = ", ".join(f"{key}={value}" for key, value in call.items())
    fewer = said_in_diffusers(facts)
    return [
        f"sample with {config['_class_name']}, whose config is in {student / 'scheduler'}, and call the pipeline "
        f"with {arguments}",
        *([f"for fewer steps change the call: {fewer}"] if fewer else []),
    ]


def _in_comfyui(
    student: Path, facts: Mapping[str, Any], output: Path, *, adapters: bool, phases: Sequence[Path]
) -> list[str]:
    """Writes a workflow beside the file; returns sentences with what it sets, since other nodes set something else.

    Whole weights have the guidance scale of a teacher that takes it as an input in them, unless the student's own
    pipeline is called with it.
    """
    config, call = read_scheduler_config(student), facts.get("call")
    if config is None or not call:
        return []
    guidance = facts.get("embedded_guidance")
    if not adapters and guidance != call.get("guidance_scale"):
        guidance = None
    schedule, levels = parametrisation_from_scheduler(config).schedule, [float(each) for each in facts["levels"]]
    level = torch.tensor(levels, dtype=torch.float64)
    flow = isinstance(schedule, FlowSchedule)
    if not flow and schedule.sigma(level[0]) < 0.99:
        return [
            f"no workflow is written: this student begins at t = {levels[0]:g} with noise of variance 1, which no "
            "sigma of ComfyUI's samplers says; sample it with diffusers, or train with student_level=null"
        ]
    one_way = len(levels) == 1 or facts.get("sampler") == "deterministic"
    sigmas = (level if flow else noise_to_signal(schedule, level)).tolist()
    sampling = ComfySampling("euler" if one_way else "lcm", sigmas, guidance)
    scale = "" if sampling.guidance is None else f", guidance {sampling.guidance:g}"
    how = f"sample with cfg 1{scale}, sampler {sampling.sampler} and the sigmas {sampling.listed()}"
    counts = phases_in(student, facts).counts() if phases else ()
    made = workflow(
        str(facts.get("pipeline")),
        output.name,
        adapters=adapters,
        phases=[(path.name, count) for path, count in zip(phases, counts, strict=False)],
        sampling=sampling,
        size=int(facts.get("image_size", 8 * facts.get("size", 64))),  # earlier students have their latents' size
        prompt=next(iter(facts.get("prompts", ())), "a photograph"),
        merged=(str(facts["teacher_lora"]), float(facts["teacher_lora_scale"])) if "teacher_lora" in facts else None,
    )
    fewer = [
        f"for {steps} of its steps take the sigmas {replace(sampling, sigmas=levels_for(sigmas, steps)).listed()}"
        for steps in fewer_steps(facts)
    ]
    if made is None:
        return [how, *fewer]
    path = output.with_suffix(".json")
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return [f"{how}, as the workflow {path} does: open it in ComfyUI and choose your own files in its loaders", *fewer]


def _adapters(student: Path) -> dict[str, Tensor]:
    path = student / LORA_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{student}: has no {LORA_FILE}, because all its weights were trained instead of adapters; train with "
            "student.lora_rank, or export with --format comfy"
        )
    return read_tensors(path)


def _comfy_lora(student: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    family, place = find_network(student)
    if family.comfy_lora is None:
        raise CheckpointError(
            f"{student}: it is not known under which names ComfyUI reads a LoRA of {family.network.__name__}, if it "
            "does; export with --format lora for diffusers"
        )
    config = read_config(place / "config.json")
    if family.original_variances:  # adapters are always those of a network whose variances were cut
        last = f"{family.component}.{family.original_variances}"
        tensors = with_variances(tensors, last, config["in_channels"])
    if family.comfy_lora == "kohya":
        return kohya_names(tensors)
    if family.comfy_lora == "diffusers":
        return tensors
    with torch.device("meta"):
        network: Any = family.network.from_config(config)
    shapes = network.state_dict()
    assert family.original_layout is not None
    return original_lora(tensors, family.component, family.original_layout(shapes, config), shapes)


def _written(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    return {
        name: (value if dtype is None or not value.is_floating_point() else _cast(name, value, dtype)).contiguous()
        for name, value in tensors.items()
    }


def _cast(name: str, value: Tensor, dtype: str) -> Tensor:
    if dtype != "fp8":
        return value.to(DTYPES[dtype])
    if value.ndim < 2 or not name.startswith(NETWORK):
        return value.to(torch.bfloat16)
    limit = torch.finfo(torch.float8_e4m3fn).max  # beyond it lies NaN
    return value.clamp(-limit, limit).to(torch.float8_e4m3fn)
