"""Students as diffusers pipeline folders: export, and loading for `generate` and `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fdistill.adapters import FAMILIES, Checkpoint, load_denoiser, resolve_checkpoint, set_null_class
from fdistill.adapters.parametrisation import load_scheduler, read_scheduler_config
from fdistill.checkpoint import load_exactly, unshared
from fdistill.denoiser import Denoiser
from fdistill.errors import CheckpointError
from fdistill.files import atomic_folder, read_json_object
from fdistill.generator import Generator, student_generator
from fdistill.latents import LatentSpace
from fdistill.one_step import OneStepPipeline

STUDENT_FILE = "fdistill_student.json"
_OWN_NETWORK = "network.safetensors"


def save_student(
    generator: Generator,
    folder: Path,
    *,
    origin: Checkpoint,
    latents: LatentSpace | None,
    card: dict[str, Any],
    config: str,
    samples: Image,
) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` runs, in a class of diffusers where one can, which then
    needs no fdistill, else in `OneStepPipeline`. A network of the user's own is written as weights alone.

    Args:
        generator: the student, holding the weights to export.
        folder: replaced as a whole if it exists.
        origin: where the student's network comes from, the teacher or another checkpoint: its pipeline class is tried,
            and its scheduler kept where that fails.
        latents: the autoencoder of a latent student, which is copied into the folder.
        card: JSON values for the model card: teacher, divergence, iterations, ...
        config: the training config, as YAML.
        samples: a grid for the card.
    """
    denoiser = generator.denoiser
    with atomic_folder(folder) as temporary:
        facts: dict[str, Any] = {"levels": list(generator.levels), "null_class": denoiser.null_class, **card}
        if origin.factory is not None:
            save_file(unshared(denoiser.state_dict()), temporary / _OWN_NETWORK)
            facts["network"] = origin.name
            usage = _OWN_USAGE.format(name=origin.name)
        else:
            pipeline, call = _pipeline(generator, origin, latents)
            pipeline.save_pretrained(temporary)
            facts |= {"pipeline": type(pipeline).__name__, "call": call}
            usage = _usage(generator, type(pipeline), call)
        (temporary / STUDENT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_model_card(generator, usage, card, config), encoding="utf-8")
        (temporary / "training_config.yaml").write_text(config, encoding="utf-8")
        samples.save(temporary / "samples.png")


def _pipeline(
    generator: Generator, origin: Checkpoint, latents: LatentSpace | None
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    denoiser: Any = generator.denoiser
    vae = latents.vae if latents is not None else None
    family = FAMILIES[type(denoiser.network).__name__]
    native: tuple[DiffusionPipeline, dict[str, Any]] | None
    native = family.native_pipeline(denoiser, generator.levels, origin.index, vae)
    if native is not None:
        return native
    scheduler = load_scheduler(read_scheduler_config(origin.folder)) if origin.folder else None
    student: dict[str, Any] = {"levels": list(generator.levels), "null_class": denoiser.null_class}
    if denoiser.latent_scaling is not None:
        scale, bias = denoiser.latent_scaling
        student |= {"latent_scale": list(scale), "latent_bias": list(bias)}
    pipeline = OneStepPipeline(denoiser.network, scheduler, vae, student)
    return pipeline, {}


def is_student(folder: Path) -> bool:
    """Whether a folder holds an exported student (and not a teacher)."""
    return (folder / STUDENT_FILE).is_file()


def student_folder(path: str | Path) -> Path:
    """The student folder at `path`, or in the run folder `path`.

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
    return folder


def load_student(path: str | Path, device: torch.device | str = "cpu", *, network: str | None = None) -> Generator:
    """An exported student as (noise, condition) -> x0, frozen, in eval mode, float32: a `OneStepGenerator`, or a
    `FewStepGenerator` if it was trained for more steps. A latent student's x0 are latents.

    Args:
        path: a student folder, or a run folder that has one.
        network: "module:function" of a student of a user's own network. It is not taken from the folder, so that no
            folder can say which code runs.

    Raises:
        CheckpointError: no such folder, or one that is not a student.
    """
    folder = student_folder(path)
    try:
        facts = read_json_object(folder / STUDENT_FILE)
        levels = [float(level) for level in facts["levels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STUDENT_FILE}: cannot be read ({error!r})") from error
    if "network" in facts:
        denoiser = _own_network(folder, facts, network)
    else:
        denoiser = load_denoiser(Checkpoint(str(path), folder))
    set_null_class(denoiser, facts.get("null_class"))
    generator = student_generator(denoiser, levels)
    return generator.eval().requires_grad_(False).to(device)


def _own_network(folder: Path, facts: dict[str, Any], network: str | None) -> Denoiser:
    if network is None:
        raise CheckpointError(
            f"student {str(folder)!r}: its network is a user's own; pass network='module:function' "
            f"(it was trained as {facts['network']!r})"
        )
    denoiser = load_denoiser(resolve_checkpoint(network))
    try:
        tensors = load_file(folder / _OWN_NETWORK)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _OWN_NETWORK}: cannot be read ({error}); copy the folder again") from error
    load_exactly(denoiser, tensors, f"student {str(folder)!r}")
    return denoiser


_OWN_USAGE = """```python
from fdistill import load_student

generator = load_student("path/to/this/folder", network="{name}")
```"""


def _usage(generator: Generator, pipeline_class: type, call: dict[str, Any]) -> str:
    """Python that draws sixteen images."""
    loader = "OneStepPipeline" if pipeline_class is OneStepPipeline else "DiffusionPipeline"
    library = "fdistill" if pipeline_class is OneStepPipeline else "diffusers"
    classes = "class_labels=[3] * 16" if generator.num_classes else "batch_size=16"
    if generator.num_classes and pipeline_class.__name__ == "ConsistencyModelPipeline":
        classes = "batch_size=16, class_labels=[3] * 16"
    arguments = ", ".join([classes, *(f"{key}={value}" for key, value in call.items())])
    return f"""```python
from {library} import {loader}

pipeline = {loader}.from_pretrained("path/to/this/folder")
images = pipeline({arguments}).images
```"""


def _rows(values: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return "\n".join(f"| {key} | {value} |" for key, value in shown.items())


def _model_card(generator: Generator, usage: str, card: dict[str, Any], config: str) -> str:
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
| noise level of each step | {", ".join(f"{level:g}" for level in generator.levels)} |
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
