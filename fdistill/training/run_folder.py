"""A run's folder: whether a run may write there, the files it starts with, and the exported student."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fdistill import __version__
from fdistill.base.distributed import from_main_process, together
from fdistill.base.errors import CheckpointError, ConfigError, NonFiniteError, OutputError
from fdistill.base.files import atomic_file, is_leftover, remove_leftovers, writing
from fdistill.base.images import grid
from fdistill.base.locks import check_free, locked
from fdistill.config.reading import changed_keys, changes, dump_config, load_config, validate
from fdistill.config.schema import DistillConfig
from fdistill.generator import Student
from fdistill.students.folder import save_student
from fdistill.training.checkpoint import check_checkpoint, checkpoints, set_aside
from fdistill.training.distillation import Distillation
from fdistill.training.journal import append_record, read_records, truncate_records
from fdistill.training.sample_grids import grid_prompts, student_images
from fdistill.training.sharding import filled, gathered
from fdistill.training.snapshots import truncate_snapshots
from fdistill.training.trackers import check_tracker

_LOCK = ".lock"


def check_output(folder: Path, config: DistillConfig, resume: bool) -> None:
    """Checks that a run may write to `folder`: it does not exist, is empty, or holds this run and `resume` is True.

    Raises:
        OutputError: the folder is a file, holds something else, or holds a run and `resume` is False, which may be
            running: the message then names its process; or what the run has written is damaged or has been removed.
        ConfigError: the run in the folder has other settings, or the tracker is not installed.
    """
    check_tracker(config.log.tracker)
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output {folder}: is a file; expected a folder that is empty or does not exist")
        if not folder.is_dir() or all(found.name == _LOCK or is_leftover(found.name) for found in folder.iterdir()):
            return
    if not (folder / "config.yaml").is_file():
        raise OutputError(f"output {folder}: not empty, and not a run (no config.yaml); choose another folder")
    if not resume:
        check_free(folder / _LOCK, f"output {folder}")
        raise OutputError(
            f"output {folder}: holds a run already; add --resume to go on with it, or choose another folder"
        )
    there = load_config(str(folder / "config.yaml"))
    changed = changed_keys(there, config)
    if changed:
        raise ConfigError(
            f"output {folder}: that run has other settings ({'; '.join(changed)}); "
            "resume with its own settings, or choose another folder"
        )
    records, every = read_records(folder / "metrics.jsonl"), there.log.checkpoint_every
    last = max((record["iteration"] for record in records), default=0)
    if 0 < every < last and not checkpoints(folder / "checkpoints"):
        raise OutputError(
            f"output {folder}: its metrics.jsonl goes on to iteration {last}, but checkpoints/ holds none; "
            "put them back, or start again in another folder"
        )


@contextmanager
def held_folder(folder: Path, config: DistillConfig, resume: bool) -> Iterator[None]:
    """Holds a run's folder, which is made if need be, for the run in this process alone; checks it as `check_output`.

    Raises:
        OutputError, ConfigError: as `check_output`; another process has a run there, which the message names.
    """
    with ExitStack() as stack:
        with writing(folder):
            stack.enter_context(locked(folder / _LOCK, f"output {folder}"))
        check_output(folder, config, resume)  # another run may have come and gone since the last check
        yield


def resume_from(folder: Path, run: Distillation) -> None:
    """Loads the newest checkpoint of a run's folder that can be used into the run; does nothing if there is none.

    Warns of newer ones that cannot be used, which `prepare_folder` sets aside. Every process must call it, and all of
    them go on from the same one.

    Raises:
        CheckpointError: each one is damaged or not of this run.
        ConfigError: the run has already done more iterations than the config says.
    """
    found, problems = checkpoints(folder / "checkpoints"), []
    for path in reversed(found):
        try:
            together(partial(_load, path, run))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(
                f"{'; '.join(problems)}; goes on from {path.name}, the newest that can, and keeps what is after it "
                "under names that end in .damaged",
                stacklevel=2,
            )
        return
    if found:
        raise CheckpointError(f"{'; '.join(problems)}; there is no other; start again in another folder")


def _load(path: Path, run: Distillation) -> None:
    """Loads a checkpoint into a run; raises what `resume_from` does of this one."""
    meta = from_main_process(lambda: check_checkpoint(path))
    iteration, iterations = meta["iteration"], run.config.iterations
    if iteration > iterations:
        raise ConfigError(f"iterations: got {iterations}, but {path.parent.parent} is at iteration {iteration} already")
    try:
        _check_settings(meta, run.config)
        run.load_state(path, iteration)
        run.check_finite()
    except (ConfigError, CheckpointError, NonFiniteError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error


def _check_settings(meta: Mapping[str, Any], config: DistillConfig) -> None:
    """Raises ConfigError if a checkpoint's settings are another run's; those of earlier versions do not say them."""
    if "config" in meta:
        changed = changed_keys(validate(meta["config"]), config)
        if changed:
            raise ConfigError(f"it was made with other settings ({'; '.join(changed)})")


def prepare_folder(folder: Path, run: Distillation) -> None:
    """Writes the files that a run's folder starts with, and removes records and snapshots after the run's iteration.

    Checkpoints after it are set aside.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _record_changes(folder, run)
    with atomic_file(folder / "config.yaml") as temporary:
        temporary.write_text(dump_config(run.config), encoding="utf-8")
    if run.resized is not None:
        listed = {"copied": run.resized.copied, "new": run.resized.new}
        with atomic_file(folder / "student_weights.json") as temporary:
            temporary.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    for place in (folder, *(folder / name for name in ("checkpoints", "samples", "ema"))):
        remove_leftovers(place)
    set_aside(folder / "checkpoints", run.iteration)
    truncate_records(folder / "metrics.jsonl", run.iteration)
    truncate_snapshots(folder / "ema", run.iteration)


def _record_changes(folder: Path, run: Distillation) -> None:
    """Adds to changes.jsonl which settings a resumed run has changed, and from which iteration on."""
    path = folder / "config.yaml"
    found = changes(load_config(path), run.config) if path.is_file() else {}
    if found:
        values = {key: {"from": before, "to": after} for key, (before, after) in found.items()}
        append_record(folder / "changes.jsonl", {"iteration": run.iteration, "changed": values})


def export_student(run: Distillation, folder: Path, *, name: str, main: bool = True, **facts: str) -> Path:
    """Writes the student with averaged weights to folder/name. `facts` are added to its model card.

    Args:
        main: whether this process writes. Of a sharded run every process must call it, as each has a part.
    """
    path = folder / name
    images = student_images(run)
    with run.ema.applied(run.config.ema.export):
        student = _whole(run, main)
        if main:
            save_student(
                student,
                path,
                origin=run.origin,
                latents=run.latents,
                card={**_card(run, folder), **facts},
                config=dump_config(run.config),
                samples=grid(images),
            )
    return path


def _whole(run: Distillation, main: bool) -> Student:
    """The run's student, as a copy on the CPU if it is distributed."""
    if run.empty_student is None:
        return run.student
    tensors = gathered(run.student.state_dict(), main)
    return filled(run.empty_student, tensors) if main else run.student


_NO_JUDGE = ": its score is in this student's loss, and is no independent measure of its images"


def _merged_lora(config: DistillConfig) -> dict[str, Any]:
    """The name and scale of the LoRA that is merged into the teacher, if there is one."""
    if config.teacher_lora is None:
        return {}
    return {"teacher_lora": Path(config.teacher_lora).name, "teacher_lora_scale": config.teacher_lora_scale}


def _card(run: Distillation, folder: Path) -> dict[str, Any]:
    """The values for the model card's tables, with the last record of training as "metrics"."""
    config, records = run.config, read_records(folder / "metrics.jsonl")
    return {
        "teacher": config.teacher,
        **_merged_lora(config),
        "teacher_guidance": config.guidance_scale,
        **({} if config.guidance_teacher is None else {"guidance_teacher": config.guidance_teacher}),
        "started_from": run.origin.name,
        "metrics": {k: v for k, v in records[-1].items() if not isinstance(v, list)} if records else {},
        "method": config.method,
        **({"stages": [stage.describe() for stage in run.stages]} if config.stages else {}),
        "divergence": config.divergence and run.divergence.name,
        "iterations": run.iteration,
        "batch_size": config.batch_size,
        "critic_steps": config.critic_steps,
        **({"any_step": True} if config.student.any_step else {}),
        **({} if run.reward is None else {"preference_model": f"{config.reward.model}{_NO_JUDGE}"}),
        "ema": config.ema.export,
        "seed": config.seed,
        "num_classes": run.student.num_classes,
        **({} if run.text is None else {"prompts": grid_prompts(run)[:16]}),
        "fdistill_version": __version__,
    }
