"""The model card in a student's folder: how to use the student, and how it was trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from fdistill.formats.pipeline_folder import components
from fdistill.generator import FewStepGenerator, Student
from fdistill.students.fewer_steps import said_in_diffusers
from fdistill.students.phases import PhasedGenerator
from fdistill.students.student_pipeline import StudentPipeline

OWN_USAGE = """```python
from fdistill import load_student

generator = load_student("path/to/this/folder", network="{name}")
```"""


def usage(generator: Student, folder: Path, pipeline: str, call: dict[str, Any]) -> str:
    """A Markdown block of Python that samples from an exported student.

    Args:
        generator: the student.
        folder: where its pipeline is.
        pipeline: the class of pipeline that it was exported as.
        call: the arguments to call the pipeline with.
    """
    cls = getattr(diffusers, pipeline)
    own = issubclass(cls, StudentPipeline)
    header = f"from fdistill import {pipeline}  # registers the class with diffusers\n" if own else ""
    if generator.denoiser.text_shapes is not None:
        drawn = 'image = pipeline(prompt="a prompt"{arguments}).images[0]'
    elif generator.num_classes and not own and "batch_size" in inspect.signature(cls.__call__).parameters:
        drawn = "images = pipeline(batch_size=16, class_labels=[3] * 16{arguments}).images"
    elif generator.num_classes:
        drawn = "images = pipeline(class_labels=[3] * 16{arguments}).images"
    else:
        drawn = "images = pipeline(batch_size=16{arguments}).images"
    arguments = "".join(f", {key}={value}" for key, value in call.items())
    lacking = "".join(f", {name}=None" for name in _lacking(cls, folder))
    if isinstance(generator, PhasedGenerator):
        return _phased_usage(generator, cls, arguments, lacking)
    return f"""```python
{header}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{lacking})
{drawn.format(arguments=arguments)}
```"""


def usage_of_fewer_steps(facts: Mapping[str, Any]) -> str:
    """A paragraph that says how to call the pipeline for fewer steps, if the student has learnt that."""
    if not facts.get("any_step"):
        return ""
    said = said_in_diffusers(facts)
    how = f"call the pipeline with {said}" if said else "`fdistill generate --steps` takes them"
    return f"\n\nThe student has learnt to take fewer steps as well: {how}."


def _phased_usage(generator: PhasedGenerator, cls: Any, arguments: str, lacking: str) -> str:
    """The same for experts that take one after another of the steps."""
    if not (hasattr(cls, "set_adapters") and "callback_on_step_end" in inspect.signature(cls.__call__).parameters):
        return """```python
from fdistill import load_student

student = load_student("path/to/this/folder")  # diffusers' pipeline of this model cannot change its adapters on the way
```"""
    names = [f"phase-{number}" for number in range(1, 1 + len(generator.denoisers))]
    later = dict(zip(generator.phases.starts[1:], names[1:], strict=False))
    return f"""The pipeline holds the base; the adapters of each phase take their own steps.

```python
from diffusers import DiffusionPipeline

folder = "path/to/this/folder"
pipeline = DiffusionPipeline.from_pretrained(folder{lacking})
for phase in {names}:
    pipeline.load_lora_weights(folder, weight_name=f"{{phase}}.safetensors", adapter_name=phase)
begins = {later}  # after so many steps


def next_phase(pipeline, step, timestep, tensors):
    if step + 1 in begins:
        pipeline.set_adapters(begins[step + 1])
    return tensors


pipeline.set_adapters("phase-1")  # before each call
image = pipeline(prompt="a prompt", callback_on_step_end=next_phase{arguments}).images[0]
```"""


def _lacking(cls: Any, folder: Path) -> list[str]:
    """The components without which diffusers loads a pipeline only if it is told so, such as a T5 that was left out."""
    parameters = inspect.signature(cls.__init__).parameters.items()
    needed = [name for name, given in parameters if name != "self" and given.default is given.empty]
    return [name for name in needed if name not in components(folder) and name not in cls._optional_components]


def _rows(values: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    shown |= {key: "; ".join(map(str, value)) for key, value in values.items() if isinstance(value, list)}
    return "\n".join(f"| {key} | {value} |" for key, value in shown.items())


def model_card(
    generator: Student, usage: str, card: dict[str, Any], config: str | None, has_samples: bool = True
) -> str:
    """The text of README.md in a student's folder; see `save_student` for `card` and `config`."""
    between = {"between two steps": generator.between} if isinstance(generator, FewStepGenerator) else {}
    rows = _rows({**between, **{key: value for key, value in card.items() if key != "metrics"}})
    steps = len(generator.levels)
    samples = "![Samples](samples.png)\n\n" if has_samples else ""
    return f"""---
library_name: diffusers
tags: [{"one-step" if steps == 1 else "few-step"}, distillation, fdistill]
---
# {steps}-step student of `{card.get("teacher")}`

Network evaluations per image: {steps}. Use no guidance: the student was trained with its teacher's guidance.
Call the pipeline with these arguments: its own defaults may be many steps, or guided.

{samples}{usage}

| | |
|---|---|
| noise level of each step | {", ".join(f"{level:g}" for level in generator.network_levels)} |
{rows}
{"" if config is None else _training(card, config)}"""


def _training(card: dict[str, Any], config: str) -> str:
    """The part about the run that trained the student."""
    metrics = {key: value for key, value in card.get("metrics", {}).items() if isinstance(value, (int, float))}
    return f"""
## Training

The last record of the run; losses and norms are means over the iterations since the record before it.

| | |
|---|---|
{_rows(metrics)}

```yaml
{config.strip()}
```
"""
