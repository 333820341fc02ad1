"""Saves a text-to-image student in its teacher's own pipeline class, so that it can be used without fdistill."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdistill.adapters.checkpoint import find_network
from fdistill.adapters.parametrisation import student_scheduler
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.base.files import read_json_object
from fdistill.denoiser import Denoiser
from fdistill.formats.pipeline_folder import share_files
from fdistill.student_kinds import Sampler
from fdistill.teachers.autoencoder import LatentSpace, image_size


def check_exportable(denoiser: Denoiser, levels: Sequence[float], sampler: Sampler = "stochastic") -> None:
    """Raises ConfigError if no scheduler of diffusers can run a student at these levels."""
    if denoiser.parametrisation is None:  # a network of the user's own, whose weights alone are exported
        return
    if student_scheduler(denoiser.parametrisation, levels, sampler) is None:
        if sampler == "deterministic" and student_scheduler(denoiser.parametrisation, levels) is not None:
            raise ConfigError(
                "student.sampler: got deterministic, but Euler's scheduler of diffusers takes no prediction of x0, and "
                f"cannot start at level {levels[0]:g} where nothing of the image is left; expected stochastic"
            )
        raise ConfigError(
            f"student_level: got {list(levels)}, {sampler}, but no scheduler of diffusers runs a text-to-image student "
            "there; expected whole timesteps, and a teacher that predicts eps, v, x0 or a flow"
        )


def save_text_pipeline(
    denoiser: Denoiser, levels: Sequence[float], sampler: Sampler, origin: Path, folder: Path, latents: LatentSpace
) -> tuple[str, dict[str, Any]]:
    """Fills a folder with the origin's pipeline, with the student's network and a scheduler that takes its steps.

    If the network takes a guidance scale as input, the scale is folded into its weights, and the exported network takes
    none. Where that is not possible, the scale is among the arguments of the call.

    Args:
        denoiser: the student's network without adapters, holding the weights to export.
        levels: noise levels of the student's steps.
        sampler: of a student of several steps, see `FewStepGenerator`.
        origin: the pipeline folder that the student's network comes from.
        latents: the student's autoencoder.

    Returns:
        The name of the pipeline's class, and the arguments to call it with beside a prompt.

    Raises:
        CheckpointError: the origin's model_index.json cannot be read.
    """
    exported = student_scheduler(denoiser.parametrisation, levels, sampler)
    assert exported is not None
    scheduler, call = exported
    family, _ = find_network(origin)
    component, text = family.component, family.text
    assert text is not None
    network: Any = denoiser.network
    arguments = dict(text.unguided)
    if denoiser.embedded_guidance is not None and text.guidance_argument is not None:
        arguments[text.guidance_argument] = denoiser.embedded_guidance
    elif denoiser.embedded_guidance is not None:
        network = copy.deepcopy(network).cpu()
        text.fold_guidance(network, denoiser.embedded_guidance)
    share_files(origin, folder, without=[component, "scheduler", "vae"])
    network.save_pretrained(folder / component)
    scheduler.save_pretrained(folder / "scheduler")
    latents.vae.save_pretrained(folder / "vae")
    try:
        index = read_json_object(origin / "model_index.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{origin / 'model_index.json'}: cannot be read ({error})") from error
    for name, entry in index.items():
        if isinstance(entry, list) and not (folder / name).is_dir():
            index[name] = [None, None]  # such as a safety checker, which was not downloaded
    index |= {name: value for name, value in text.student_index.items() if name in index}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["vae"] = ["diffusers", type(latents.vae).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    size = image_size(denoiser, latents)
    return str(index["_class_name"]), {**call, **arguments, "height": size, "width": size}
