"""Students as diffusers pipeline folders: export, and loading for `generate` and `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fdistill.adapters import family
from fdistill.errors import CheckpointError
from fdistill.files import atomic_folder, read_json_object
from fdistill.generator import OneStepGenerator

STUDENT_FILE = "fdistill_student.json"


def save_student(generator: OneStepGenerator, folder: Path, *, teacher_folder: Path, card: dict[str, Any]) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` runs in one step without importing fdistill.

    Args:
        generator: the student, holding the weights to export.
        folder: replaced as a whole if it exists.
        teacher_folder: says which adapter exports it.
        card: JSON values for the model card: teacher, divergence, iterations, ...
    """
    with atomic_folder(folder) as temporary:
        family(teacher_folder).export(generator.denoiser, generator.level, temporary)
        student = {"level": generator.level, **card}
        (temporary / STUDENT_FILE).write_text(json.dumps(student, indent=2) + "\n")
        (temporary / "README.md").write_text(_model_card(generator, card))


def is_student(folder: Path) -> bool:
    """Whether a folder holds an exported student (and not a teacher)."""
    return (folder / STUDENT_FILE).is_file()


def load_student(path: str | Path, device: torch.device | str = "cpu") -> OneStepGenerator:
    """An exported student as (noise, condition) -> x0, frozen, in eval mode, float32.

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
        level = float(read_json_object(folder / STUDENT_FILE)["level"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STUDENT_FILE}: cannot be read ({error!r})") from error
    generator = OneStepGenerator(family(folder).load(folder), level)
    return generator.eval().requires_grad_(False).to(device)


def _model_card(generator: OneStepGenerator, card: dict[str, Any]) -> str:
    labels = ", class_labels=[3] * 16" if generator.num_classes else ""
    rows = "\n".join(f"| {key} | {value} |" for key, value in card.items())
    return f"""---
library_name: diffusers
tags: [one-step, distillation, fdistill]
---
# One-step student of `{card.get("teacher")}`

One network evaluation an image, no guidance.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
images = pipeline(batch_size=16{labels}, num_inference_steps=1).images
```

| setting | value |
|---|---|
| level (sigma) the student starts from | {generator.level:g} |
{rows}
"""
