"""Writes a run's output during training: records, scores, sample grids, snapshots, checkpoints, curves."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor

from fdistill import __version__
from fdistill.base.errors import NonFiniteError
from fdistill.base.files import writing
from fdistill.base.images import save_grid
from fdistill.ema_profiles import profile_name
from fdistill.training.alarms import WINDOW, alarms, drifts
from fdistill.training.appearance import LOOK, appearance
from fdistill.training.breakdown import BrokenRunError, advice
from fdistill.training.checkpoint import checkpoints, newest_intact, save_checkpoint
from fdistill.training.curves import save_curves
from fdistill.training.distillation import Distillation
from fdistill.training.environment import peak_memory
from fdistill.training.journal import Journal, append_record, read_records, scalars
from fdistill.training.run_folder import export_student
from fdistill.training.sample_grids import grid_groups, student_images, teacher_images
from fdistill.training.saving import Saver
from fdistill.training.sharding import gathered
from fdistill.training.snapshots import save_snapshot
from fdistill.training.stages import changing_rates, stage_at
from fdistill.training.trackers import start_tracker


class Scorer(Protocol):
    """Scores a run's student during training; `evaluation.watch.Watch` implements this protocol."""

    def scores(self) -> dict[str, float]:
        """The current student's scores, by their names in records."""

    def is_best(self, scores: Mapping[str, float], earlier: Sequence[Mapping[str, Any]]) -> bool:
        """Whether no earlier record has a better score."""

    def reason(self, scores: Mapping[str, float], iteration: int) -> str:
        """Why this student was kept, as a text for its model card."""


class Logbook:
    """A context manager around training; call `after_iteration` once after each iteration.

    Records and scores are computed over all processes, so every process must call it; only the main process writes.

    Args:
        watch: scores the student during training; None for no scores.
        main: whether this is the process that writes.

    Attributes:
        alarms: {name: sentence} that stand at the last record; those of how samples look until the next samples.
    """

    def __init__(self, run: Distillation, folder: Path, watch: Scorer | None, *, main: bool):
        self._run, self._config, self._folder = run, run.config, folder
        self._watch, self._main = watch, main
        schedule = run.networks.teacher.schedule
        self.journal = Journal(
            lambda t: run.ratio.bin_index(run.ratio.bin_level(schedule, t)),
            run.ratio.num_bins,
            self._config.max_skipped,
        )
        self._owed = False  # a checkpoint that was due while a role was stuck
        self._recent: list[dict[str, Any]] = []
        self._looks: list[dict[str, Any]] = []  # records with samples
        self._drifting: dict[str, str] = {}
        self.alarms: dict[str, str] = {}
        self._scored: list[dict[str, float]] = []
        self._best = 0  # the iteration with the best scores
        self._trackers: list[GeneralTracker] = []
        self._teacher_look: dict[str, float] = {}
        self._started, self._first = time.perf_counter(), run.iteration
        self._stack = ExitStack()
        self._saver = Saver()

    def __enter__(self) -> Logbook:
        iteration = self._run.iteration
        self._stack.enter_context(writing(self._folder))
        started = start_tracker(self._config, self._folder, iteration) if self._main else None
        if started is not None:
            self._trackers.append(started)
            self._stack.callback(started.finish)
        earlier = read_records(self._folder / "metrics.jsonl")
        self._recent = earlier[-WINDOW:]
        self._looks = [record for record in earlier if f"{LOOK}contrast" in record]
        for record in earlier:
            scores = {key: value for key, value in record.items() if key.startswith("eval/")}
            self._note_scores(scores, record["iteration"])
        if self._config.log.samples_every and self._takes_part:
            self._teacher_look = {k: v for r in earlier for k, v in r.items() if k.startswith(f"{LOOK}teacher_")}
            if iteration == 0 or not self._teacher_look:
                self._teacher_look = self._save_teacher_samples()
            if iteration == 0:
                self._save_samples()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            self._saver.wait()
        elif issubclass(error[0], Exception):
            with suppress(Exception):  # the error that came first is the one to show
                self._saver.wait()
        return self._stack.__exit__(*error)

    @property
    def _takes_part(self) -> bool:
        """Whether this process runs the student when images or weights are written: all must, if each has a part."""
        return self._main or self._run.sharded

    def after_iteration(self, skipped: Sequence[object], *, stopping: bool) -> dict[str, Any] | None:
        """Writes whatever is due at this iteration, and returns the record if one was.

        Args:
            skipped: the data's items that could not be read.
            stopping: whether the run ends here, so that a checkpoint is due.

        Raises:
            NonFiniteError: a loss or a role's weights became NaN or infinite; nothing of this iteration is saved.
        """
        config, snapshots = self._config, self._config.ema.snapshot_every
        last = self._run.iteration == config.iterations
        stage_ends = any(self._run.iteration == stage.end for stage in self._run.stages)
        must = last or stopping
        checkpoint = must or self._due(config.log.checkpoint_every) or (self._owed and self._due(config.log.every))
        snapshot = snapshots > 0 and (last or self._due(snapshots))
        measured = self._watch is not None and (last or self._due(config.eval.every))
        sampled = config.log.samples_every > 0 and (last or self._due(config.log.samples_every))
        written = None
        if stage_ends or checkpoint or snapshot or measured or sampled or self._due(config.log.every):
            try:
                record = self.journal.record()
                if checkpoint or snapshot or measured:
                    self._run.check_finite()
                scores = self._scores() if measured else {}
            except NonFiniteError as error:
                raise self._stopped(error) from error
            is_best = self._note_scores(scores, self._run.iteration)
            if sampled and self._takes_part:
                record |= self._save_samples()
            written = self._write_record(record, scores, len(skipped), is_best=is_best)
            checkpoint = checkpoint or (is_best and config.log.keep_best)
            # Where a role's losses are not finite any more, the checkpoint before is the better one to go on from.
            self._owed = checkpoint and self.journal.stuck and not must
            checkpoint = checkpoint and not self._owed
        if snapshot and self._takes_part:  # before the checkpoint: a run resumed from it has every snapshot up to it
            for width in config.ema.sigma_rel:
                average = gathered(self._run.ema.shadows[profile_name(width)], self._main)
                if self._main:
                    save_snapshot(self._folder / "ema", self._run.iteration, width, average)
        if checkpoint:
            self._save_checkpoint()
        self._saver.check()
        return written

    def save_curves(self) -> None:
        """Draws curves.png from all records."""
        if self._main:
            save_curves(read_records(self._folder / "metrics.jsonl"), self._folder / "curves.png")

    def _due(self, every: int) -> bool:
        return every > 0 and self._run.iteration % every == 0

    def _scores(self) -> dict[str, float]:
        """Scores of the averaged weights that are exported; the time this takes is not counted as training time."""
        assert self._watch is not None
        before = time.perf_counter()
        self._run.student.eval()
        with self._run.ema.applied(self._config.ema.export):
            scores = self._watch.scores()
        self._run.student.train()
        self._started += time.perf_counter() - before
        return scores

    def _note_scores(self, scores: dict[str, float], iteration: int) -> bool:
        """Whether these are the best scores so far; those of any iteration count from now on."""
        if self._watch is None or not scores:
            return False
        is_best = self._watch.is_best(scores, self._scored)
        self._scored.append(scores)
        self._best = iteration if is_best else self._best
        return is_best

    def _write_record(
        self, record: dict[str, Any], scores: dict[str, float], skipped: int, *, is_best: bool
    ) -> dict[str, Any]:
        """Writes a record with its scores and returns it; exports the student if these are the best."""
        seconds, iteration = time.perf_counter() - self._started, self._run.iteration
        record = {
            "iteration": iteration,
            "images_per_second": (iteration - self._first) * self._config.batch_size / seconds,
            "seconds": seconds,
            **({} if (memory := peak_memory(self._run.device)) is None else {"memory_gb": memory}),
            "data/skipped": skipped,
            **({"stage": stage_at(self._run.stages, iteration - 1).number} if self._config.stages else {}),
            **changing_rates(self._run.stages, iteration - 1, self._run.optimizers),
            **record,
            **scores,
        }
        if self._main:
            self._raise_alarms(record)
            for cause in record.get("skipped", ()):
                warnings.warn(f"iteration {iteration}: {cause}; that update was skipped", stacklevel=2)
            path = self._folder / "metrics.jsonl"
            append_record(path, record)
            for tracker in self._trackers:
                tracker.log(scalars(record), step=iteration)
        # Before the checkpoint, so that a run resumed from it has the best student of all records up to it.
        watch = self._watch
        if watch is not None and is_best and self._takes_part:
            reason = watch.reason(scores, iteration)
            export_student(self._run, self._folder, name="best", main=self._main, kept_for=reason)
        return record

    def _raise_alarms(self, record: dict[str, Any]) -> None:
        """Adds to a record the alarms that it raises, and warns of those that the record before has not raised."""
        before = self._recent[-1].get("alarms", ()) if self._recent else ()
        self._recent = [*self._recent, record][-WINDOW:]
        found = alarms(self._recent)
        if f"{LOOK}contrast" in record:
            before = [*before, *(self._looks[-1].get("alarms", ()) if self._looks else ())]
            self._looks.append(record)
            self._drifting = drifts(self._looks)
            found |= self._drifting
        self.alarms = found | self._drifting
        if found:
            record["alarms"] = list(found)
        for name, sentence in found.items():
            if name not in before:
                warnings.warn(f"iteration {record['iteration']}: {name}: {sentence}", stacklevel=2)

    def _save_samples(self) -> dict[str, float]:
        """Saves a grid of the student's samples; returns how they look, and how the teacher's do."""
        images = student_images(self._run)
        if self._main:
            save_grid(images, self._folder / "samples" / f"{self._run.iteration:06d}.png")
        return self._look(images, "") | self._teacher_look

    def _save_teacher_samples(self) -> dict[str, float]:
        images = teacher_images(self._run)
        if self._main:
            save_grid(images, self._folder / "samples" / "teacher.png")
        return self._look(images, "teacher_")

    def _look(self, images: Tensor, whose: str) -> dict[str, float]:
        return {f"{LOOK}{whose}{name}": value for name, value in appearance(images, grid_groups(self._run)).items()}

    def _save_checkpoint(self) -> None:
        meta = {
            "fdistill_version": __version__,
            "torch_version": torch.__version__,
            "config": self._config.model_dump(mode="json"),
        }
        keep, folder = self._config.log.keep_checkpoints, self._folder / "checkpoints"
        spared = {self._best} if self._config.log.keep_best else set()
        write = partial(save_checkpoint, folder, self._run.iteration, meta=meta, keep=keep, spared=spared)
        self._saver.save(self._run.state(), write)

    def _stopped(self, error: NonFiniteError) -> NonFiniteError:
        """What happened, which role's update was out of range first, and how to go on."""
        self._saver.wait()
        good = newest_intact(checkpoints(self._folder / "checkpoints"))
        leap = error.leap if isinstance(error, BrokenRunError) else None
        named = str(error).partition(":")[0]
        role = leap.role if leap is not None else named if named in self._config.roles else "generator"
        stage = stage_at(self._run.stages, self._run.iteration - 1)
        cause = ""
        if leap is not None and leap.role != named:
            cause = f"; before that, an update of {leap.role} took the norm of its weights {leap.path()}"
        kept = f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
        return NonFiniteError(
            f"stopped at iteration {self._run.iteration}: {error}{cause}; {kept}; to go on, {advice(role, leap, stage)}"
        )
