"""Students as diffusers pipeline folders: export, and loading for `generate` and `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fdistill.adapters import family
from fdistill.errors import CheckpointError
from fdistill.files import atomic_folder, read_json_object
from fdistill.generator import Generator, student_generator

STUDENT_FILE = "fdistill_student.json"


def save_student(generator: Generator, folder: Path, *, teacher_folder: Path, card: dict[str, Any]) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` runs without importing fdistill.

    Args:
        generator: the student, holding the weights to export.
        folder: replaced as a whole if it exists.
        teacher_folder: says which adapter exports it.
        card: JSON values for the model card: teacher, divergence, iterations, ...
    """
    with atomic_folder(folder) as temporary:
        timesteps = family(teacher_folder).export(generator.denoiser, generator.levels, temporary)
        if len(generator.levels) > 1:
            card = {**card, "pipeline_timesteps": timesteps}
        student = {"levels": list(generator.levels), **card}
        (temporary / STUDENT_FILE).write_text(json.dumps(student, indent=2) + "\n")
        (temporary / "README.md").write_text(_model_card(generator, card))


def is_student(folder: Path) -> bool:
    """Whether a folder holds an exported student (and not a teacher)."""
    return (folder / STUDENT_FILE).is_file()


def load_student(path: str | Path, device: torch.device | str = "cpu") -> Generator:
    """An exported student as (noise, condition) -> x0, frozen, in eval mode, float32: a `OneStepGenerator`, or a
    `FewStepGenerator` if it was trained for more steps.

    Args:
        path: a student folder, or a run folder that has one.

    Raises:
        CheckpointError: no such folder, or one that is not a student.
    """
    folder = Path(path)
    if is_student(folder / "student"):
        folder = folder / "student"
    if not folder.is_dir():
        raise CheckpointError(
            f"student {str(path)!r}: no such folder; expected what `fdistill distill` wrote to OUTPUT/student"
        )
    if not is_student(folder):
        raise CheckpointError(
            f"student {str(path)!r}: no {STUDENT_FILE} in it; expected what `fdistill distill` wrote to OUTPUT/student"
        )
    try:
        levels = [float(level) for level in read_json_object(folder / STUDENT_FILE)["levels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STUDENT_FILE}: cannot be read ({error!r})") from error
    generator = student_generator(family(folder).load(folder), levels)
    return generator.eval().requires_grad_(False).to(device)


def _model_card(generator: Generator, card: dict[str, Any]) -> str:
    labels = ", class_labels=[3] * 16" if generator.num_classes else ""
    rows = "\n".join(f"| {key} | {value} |" for key, value in card.items())
    steps = len(generator.levels)
    call = "num_inference_steps=1"
    if steps > 1:
        call = f"num_inference_steps=None, timesteps={card['pipeline_timesteps']}"
    return f"""---
library_name: diffusers
tags: [one-step, distillation, fdistill]
---
# {steps}-step student of `{card.get("teacher")}`

Network evaluations an image: {steps}. No guidance.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
images = pipeline(batch_size=16{labels}, {call}).images
```

| setting | value |
|---|---|
| levels (sigma) the student is used at | {", ".join(f"{level:g}" for level in generator.levels)} |
{rows}
"""
