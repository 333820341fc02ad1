"""Students as diffusers pipeline folders: export, and loading for `generate` and `evaluate`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fdistill.adapters import family_of, set_null_class
from fdistill.adapters.checkpoint import Checkpoint, load_denoiser, resolve_checkpoint
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import KEPT_SUFFIXES, read_json_object, replaced_folder
from fdistill.base.hashes import check_files, noted_files
from fdistill.base.reading import not_here
from fdistill.base.state_dicts import load_exactly, unshared
from fdistill.denoiser import Denoiser
from fdistill.formats.lora_file import LORA_FILE, save_lora
from fdistill.generator import Student, student_generator
from fdistill.rollout import levels_for
from fdistill.student_kinds import NOTED_FILES, STUDENT_FILE
from fdistill.students.experts import load_phased, save_experts
from fdistill.students.hub import student_on_hub
from fdistill.students.kinds import kind_in, kind_of
from fdistill.students.lora import has_adapters, merged, without_adapters
from fdistill.students.model_card import OWN_USAGE, model_card, usage, usage_of_fewer_steps
from fdistill.students.phases import PhasedGenerator
from fdistill.teachers.autoencoder import LatentSpace, image_size

OWN_NETWORK = "network.safetensors"


def save_student(
    generator: Student,
    folder: Path,
    *,
    origin: Checkpoint,
    latents: LatentSpace | None,
    card: dict[str, Any],
    config: str | None,
    samples: Image | None,
) -> None:
    """Writes a student as a folder that `DiffusionPipeline.from_pretrained` loads.

    The pipeline is a class of diffusers where one can run the student; that folder works without fdistill. Otherwise
    it is a pipeline class of fdistill. For a network of the user's own, only the weights are written.

    Args:
        generator: the student, holding the weights to export.
        folder: replaced as a whole if it exists.
        origin: the checkpoint that the student's network comes from: the teacher or another one. Its pipeline class is
            used if it can run the student; otherwise only its scheduler is kept.
        latents: the autoencoder of a latent student, which is copied into the folder.
        card: JSON values for the model card: teacher, divergence, iterations, ...
        config: the training config, as YAML; None for a student that was trained elsewhere.
        samples: a grid for the card, or None.
    """
    denoiser = generator.denoiser
    with replaced_folder(folder) as temporary:
        facts: dict[str, Any] = {**generator.settings(), "null_class": denoiser.null_class, **card}
        if denoiser.text_shapes is not None:
            facts["size"] = denoiser.sample_shape[-1]
            facts["image_size"] = image_size(denoiser, latents)
        if denoiser.embedded_guidance is not None:
            facts["embedded_guidance"] = denoiser.embedded_guidance
        if isinstance(generator, PhasedGenerator):
            save_experts(generator, temporary)
            denoiser = without_adapters(denoiser)
        elif has_adapters(denoiser):
            if origin.factory is None:
                component = family_of(denoiser.network).component
                save_lora(denoiser.network, temporary / LORA_FILE, component)
            denoiser = merged(denoiser)
        if origin.factory is not None:
            save_file(unshared(denoiser.state_dict()), temporary / OWN_NETWORK)
            facts["network"] = origin.name
            how = OWN_USAGE.format(name=origin.name)
        else:
            name, call = kind_of(generator).save_pipeline(temporary, generator, denoiser, origin, latents)
            facts |= {"pipeline": name, "call": call}
            how = usage(generator, temporary, name, call) + usage_of_fewer_steps(facts)
        found = [path for path in temporary.rglob("*") if path.suffix in KEPT_SUFFIXES and path.is_file()]
        facts[NOTED_FILES] = noted_files(temporary, sorted(path.relative_to(temporary).as_posix() for path in found))
        (temporary / STUDENT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        text = model_card(generator, how, card, config, samples is not None)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        if config is not None:
            (temporary / "training_config.yaml").write_text(config, encoding="utf-8")
        if samples is not None:
            samples.save(temporary / "samples.png")


def find_student(path: str | Path) -> Path | None:
    """The student folder at `path`, or in the run folder `path`; None if neither holds a student."""
    places = (Path(path), Path(path) / "student")
    return next((folder for folder in places if (folder / STUDENT_FILE).is_file()), None)


def fetch_student(name: str | Path) -> Path | None:
    """Like `find_student`, but a name that no path has may be a student's id on the hub, which is downloaded.

    Raises:
        CheckpointError: the student on the hub cannot be downloaded.
    """
    return find_student(name) or student_on_hub(str(name))


def student_folder(path: str | Path) -> Path:
    """Like `fetch_student`, but raises an error if there is no student.

    Raises:
        CheckpointError: the folder does not exist or holds no student, and the hub has none of that id.
    """
    folder = fetch_student(path)
    if folder is None:
        missing = f"no {STUDENT_FILE} in it" if Path(path).is_dir() else not_here(Path(path), "no such folder")
        raise CheckpointError(
            f"student {str(path)!r}: {missing}; expected what `fdistill distill` wrote to OUTPUT/student, or a "
            "student's hub id"
        )
    return folder


def student_facts(folder: Path) -> dict[str, Any]:
    """What fdistill_student.json in a student folder says; raises CheckpointError if it cannot be read."""
    try:
        return read_json_object(folder / STUDENT_FILE)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def checked_facts(folder: Path) -> dict[str, Any]:
    """`student_facts` of a folder whose weights and configs are those that were written. They are read once for that,
    at 1.7 GB a second from memory, or as fast as the disk is. Folders of earlier versions have no hashes.

    Raises:
        CheckpointError: a file is missing or another one.
    """
    facts = student_facts(folder)
    try:
        check_files(folder, facts.get(NOTED_FILES, {}))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"student {folder}: {error}; copy the student's folder again, or, if the file was changed on purpose, "
            f'remove its entry under "{NOTED_FILES}" in {STUDENT_FILE}'
        ) from error
    return facts


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder / STUDENT_FILE}: cannot be read ({error!r}); copy the student's folder again")


def load_student(
    path: str | Path, device: torch.device | str = "cpu", *, network: str | None = None, steps: int | None = None
) -> Student:
    """Loads an exported student: a function (noise, condition) -> x0, frozen, in eval mode, in float32.

    It is a `OneStepGenerator`, a `FewStepGenerator` if it was trained for several steps, or a `TiUEGenerator`. The x0
    of a latent student are latents.

    Args:
        path: a student folder, a run folder that has one, or a student's id on the hub.
        network: "module:function" that returns the network, for students of a user's own network. It is not read from
            the folder, so that no folder can choose which code runs.
        steps: how many steps the student takes, at least 1; None for those it was trained for. Fewer pass some of its
            levels, more pass levels in between (`rollout.levels_for`). A warning says so if it has not learnt that
            (`student.any_step`).

    Raises:
        CheckpointError: the folder does not exist, holds no student, or a file of it is damaged.
        ArgumentError: a number of steps for a kind of student that takes one.
    """
    folder = student_folder(path)
    facts = checked_facts(folder)
    try:
        levels = kind_in(facts).levels_in(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    if "network" in facts:
        denoiser = _own_network(folder, facts, network)
    else:
        if network is not None:
            raise CheckpointError(f"network: got {network!r}, but {path} holds its network itself; leave it out")
        denoiser = load_denoiser(Checkpoint(str(path), folder))
    set_null_class(denoiser, facts.get("null_class"))
    if denoiser.text_shapes is not None:
        try:
            denoiser.resize(int(facts["size"]), int(facts["size"]))
            if denoiser.embedded_guidance is not None:  # the exported network still takes it
                denoiser.embedded_guidance = float(facts["embedded_guidance"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise _unreadable(folder, error) from error
    sampler = facts.get("sampler", "stochastic")
    if steps is not None and not kind_in(facts).steps:
        raise ArgumentError(f"steps: got {steps}, but {path} is a student that takes one step; leave it out")
    others = None if steps is None or steps == len(levels) else _other_levels(path, facts, levels, steps)
    generator: Student
    if "phases" in facts:
        generator = load_phased(denoiser, folder, facts, others)
    elif others is None:
        generator = kind_in(facts).make(denoiser, levels, sampler)
    else:
        generator = student_generator(denoiser, others, sampler)
    return generator.eval().requires_grad_(False).to(device)


def _other_levels(path: str | Path, facts: dict[str, Any], levels: list[float], steps: int) -> tuple[float, ...]:
    if steps > len(levels) or not facts.get("any_step"):
        learnt = f"1 to {len(levels)}" if facts.get("any_step") else f"{len(levels)}"
        warnings.warn(f"{path}: takes {steps} steps, but has learnt to take {learnt}", stacklevel=3)
    return levels_for(levels, steps)


def _own_network(folder: Path, facts: dict[str, Any], network: str | None) -> Denoiser:
    if network is None:
        raise CheckpointError(
            f"student {str(folder)!r}: its network is a user's own; pass network='module:function' "
            f"(it was trained as {facts['network']!r})"
        )
    denoiser = load_denoiser(resolve_checkpoint(network))
    try:
        tensors = load_file(folder / OWN_NETWORK)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / OWN_NETWORK}: cannot be read ({error}); copy the folder again") from error
    load_exactly(denoiser, tensors, f"student {str(folder)!r}")
    return denoiser
