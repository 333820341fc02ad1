"""What a student's folder says of itself: how to use it, what made it."""

from __future__ import annotations

from typing import Any

from fdistill.adapters import OWN_PIPELINES
from fdistill.generator import Student

OWN_USAGE = """```python
from fdistill import load_student

generator = load_student("path/to/this/folder", network="{name}")
```"""


def usage(generator: Student, pipeline: str, call: dict[str, Any]) -> str:
    """Python that draws with a student that was exported as this class of pipeline, called so."""
    own = pipeline in OWN_PIPELINES
    header = f"from fdistill import {pipeline}  # which diffusers then knows\n" if own else ""
    if generator.denoiser.text_shapes is not None:
        drawn = 'image = pipeline("a prompt"{arguments}).images[0]'
    elif generator.num_classes and pipeline == "ConsistencyModelPipeline":
        drawn = "images = pipeline(batch_size=16, class_labels=[3] * 16{arguments}).images"
    elif generator.num_classes:
        drawn = "images = pipeline(class_labels=[3] * 16{arguments}).images"
    else:
        drawn = "images = pipeline(batch_size=16{arguments}).images"
    arguments = "".join(f", {key}={value}" for key, value in call.items())
    return f"""```python
{header}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
{drawn.format(arguments=arguments)}
```"""


def _rows(values: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    shown |= {key: "; ".join(map(str, value)) for key, value in values.items() if isinstance(value, list)}
    return "\n".join(f"| {key} | {value} |" for key, value in shown.items())


def model_card(generator: Student, usage: str, card: dict[str, Any], config: str) -> str:
    rows = _rows({key: value for key, value in card.items() if key != "metrics"})
    metrics = {key: value for key, value in card.get("metrics", {}).items() if isinstance(value, (int, float))}
    steps = len(generator.levels)
    return f"""---
library_name: diffusers
tags: [one-step, distillation, fdistill]
---
# {steps}-step student of `{card.get("teacher")}`

Network evaluations an image: {steps}. No guidance: what the teacher's had was learnt. Call the pipeline with
these arguments: its own defaults may be many steps, or guided.

![Samples](samples.png)

{usage}

| | |
|---|---|
| noise level of each step | {", ".join(f"{level:g}" for level in generator.network_levels)} |
{rows}

## Training

The last record of the run; losses and norms are means over the iterations since the record before it.

| | |
|---|---|
{_rows(metrics)}

```yaml
{config.strip()}
```
"""
