"""Loads diffusers pipelines from folders: weights from safetensors alone, and no code but diffusers' and fdistill's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from fdistill.adapters import OWN_COMPONENT, network_components
from fdistill.adapters.checkpoint import Checkpoint, check_configs, check_pipeline, find_network, resolve_checkpoint
from fdistill.adapters.config_fields import check_network_config
from fdistill.adapters.parametrisation import parametrisation_from_scheduler, read_scheduler_config
from fdistill.adapters.pretrained import LOADING_ERRORS, load_network
from fdistill.base.errors import CheckpointError
from fdistill.formats.pipeline_folder import read_config
from fdistill.students import one_step_pipeline, tiue_pipeline  # noqa: F401  they register their classes with diffusers
from fdistill.students.student_pipeline import StudentPipeline
from fdistill.teachers.text_encoders import quiet

#: Components that censor or watermark images are left out: black images and marks would be measured.
_LEFT_OUT: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
    "watermarker": None,
    "add_watermarker": False,
}
_ELSEWHERE = "make images with the program that it comes with, and evaluate their folder"
#: Components of pipelines that no family has, which are evaluated in sampling steps.
_OTHER_NETWORKS = ("prior", "prior_prior", "decoder")


def pipeline_class(checkpoint: Checkpoint) -> type[DiffusionPipeline] | None:
    """The pipeline class of diffusers (or fdistill) that a folder names; None if there is no such class."""
    name = checkpoint.index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def load_pipeline(checkpoint: Checkpoint) -> DiffusionPipeline:
    """Loads a pipeline in float32 on the CPU, without safety checker, watermark and progress bars.

    Raises:
        CheckpointError: it is no pipeline folder; diffusers does not have its class; the class needs more than prompts,
            labels or noise; components are code; or files are missing, truncated or pickles.
    """
    folder, name = checkpoint.folder, checkpoint.index.get("_class_name")
    if folder is not None:
        check_configs(folder)
    if folder is None or name is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: no model_index.json that can be read; expected a folder that a "
            "diffusers pipeline was saved to, or leave out `--sampler pipeline`"
        )
    chosen = pipeline_class(checkpoint)
    if chosen is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: pipeline class {name!r} is not one of diffusers {diffusers.__version__}, "
            f"and code of checkpoints is not run; {_ELSEWHERE}"
        )
    _check_call(checkpoint.name, chosen)
    _check_libraries(checkpoint, folder)
    takes = inspect.signature(chosen.__init__).parameters
    given = {key: value for key, value in _LEFT_OUT.items() if key in takes}
    given |= {part: None for part, entry in checkpoint.index.items() if entry == [None, None] and part in takes}
    for part, entry in checkpoint.index.items():
        network = _network_class(entry)
        if network is not None and part not in given:
            place = folder / part if (folder / part).is_dir() else folder  # as in the oldest pipelines
            given[part] = load_network(network, place)  # it refuses weights that do not fit
    try:
        with quiet():
            pipeline: DiffusionPipeline = chosen.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, **given
            )
            pipeline.to(torch.float32)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be loaded ({one_line(error)}); expected all folders that its model_index.json "
            "names, with safetensors"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_call(name: str, chosen: type[DiffusionPipeline]) -> None:
    """Raises CheckpointError unless a class makes images from prompts, from labels or from noise alone."""
    takes = call_parameters(chosen)
    steps = [] if issubclass(chosen, StudentPipeline) else ["num_inference_steps"]
    missing = {"generator", "output_type", *steps} - takes.keys()
    needed = [
        key
        for key, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in ("self", "prompt", "class_labels")
    ]
    if missing or needed:
        why = f"takes no {min(missing)}" if missing else f"needs {needed[0]}"
        raise CheckpointError(
            f"checkpoint {name!r}: {chosen.__name__} {why}; expected a class that makes images from prompts, from "
            "class labels or from noise alone"
        )


def _check_libraries(checkpoint: Checkpoint, folder: Path) -> None:
    """Raises CheckpointError if diffusers would load a component's class from outside of itself and transformers."""
    for part, entry in checkpoint.index.items():
        if not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        library = str(entry[0])
        known = library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, library)
        if not (known or library.startswith("fdistill.")) or (folder / part / f"{library}.py").exists():
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r}: its {part} is of {library!r}, and code of checkpoints is not run; "
                f"{_ELSEWHERE}"
            )
    if (folder / "None.py").exists():  # older versions of diffusers would run it as the pipeline
        raise CheckpointError(f"{folder / 'None.py'}: code of checkpoints is not run; remove it")


def _network_class(entry: Any) -> type[ModelMixin] | None:
    """The class of a component; None if it is no network of diffusers."""
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers":
        return None
    found = getattr(diffusers, str(entry[1]), None)
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None


def evaluated_networks(pipeline: DiffusionPipeline) -> list[Any]:
    """The networks of a pipeline that are evaluated in sampling steps."""
    parts = pipeline.components.items()
    starts = (*network_components(), OWN_COMPONENT)  # some pipelines have a unet_2, too
    return [
        part
        for name, part in parts
        if isinstance(part, nn.Module) and (name.startswith(starts) or name in _OTHER_NETWORKS)
    ]


def call_parameters(chosen: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline class's call."""
    return inspect.signature(chosen.__call__).parameters


def one_line(error: Exception) -> str:
    """The first 400 characters of another library's message, on one line."""
    return " ".join(str(error).split())[:400]


def only_diffusers_runs(name: str | Path) -> bool:
    """Whether diffusers can run a checkpoint that fdistill cannot: no adapter reads its network, its scheduler, or a
    field of their configs.
    """
    try:
        checkpoint = resolve_checkpoint(name)
    except CheckpointError:
        return False
    if checkpoint.folder is None or pipeline_class(checkpoint) is None:
        return False
    try:
        family, network = find_network(checkpoint.folder)
        check_pipeline(checkpoint, family)
        check_network_config(family.network, read_config(network / "config.json"))
        parametrisation_from_scheduler(read_scheduler_config(checkpoint.folder))
    except CheckpointError:
        return True
    return False
