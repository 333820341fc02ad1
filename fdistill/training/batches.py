"""The arguments of the two updates of an iteration: samples, conditions, and what a run's settings add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.base.devices import upload
from fdistill.base.images import to_unit
from fdistill.condition import Condition, none_like, upload_condition, where
from fdistill.data import Batch, EpochOrder
from fdistill.rollout import Rollout, levels_for
from fdistill.step import Pairs, Segment
from fdistill.training.distillation import Distillation
from fdistill.training.inputs import TrainingData
from fdistill.training.parts import ImageLoss
from fdistill.training.stages import age_of


@dataclass(frozen=True)
class _Read:
    """A batch on the device: real_x0 [B, C, H, W] in [-1, 1], its condition, and its rows in the data."""

    real_x0: Tensor
    condition: Condition | None
    rows: Tensor


class Batches:
    """Makes the arguments of the updates, one iteration after another.

    They depend on the seed, the iteration and the data alone, so that a resumed run computes the same numbers as an
    uninterrupted one.

    Args:
        read: batches from the loader, starting at the run's iteration.
    """

    def __init__(self, run: Distillation, data: TrainingData, read: Iterator[Batch]):
        config = run.config
        self._run, self._data, self._loader, self._device = run, data, read, run.device
        rank, processes = rng.world()
        local = config.batch_size // processes
        self._local, self._mine = local, slice(rank * local, (rank + 1) * local)
        self._pair_order = EpochOrder(len(data.pairs.x0), config.batch_size, config.seed) if data.pairs else None
        self._last: _Read | None = None
        self._shape = run.networks.teacher.sample_shape

    def critic(self, number: int) -> dict[str, Any]:
        """Arguments of critic update `number` (from 0) of this iteration, except the random generator and the samples
        that are used again.
        """
        batch = number if self._run.stage.batches > 1 else 0
        if self._last is None or batch == number:
            self._last = self._next()
        read = self._last
        return {
            "real_x0": read.real_x0,
            "condition": read.condition,
            **self._rollout(batch, read.real_x0),
            **self._without_some_conditions(read.condition, number),
        }

    def student(self) -> dict[str, Any]:
        """Arguments of the student's update, except the random generator.

        The student gets the conditions of the critic's last batch; without a critic there is none, and no condition.
        """
        stage = self._run.stage
        last = self._last if stage.critic_steps else None
        return {
            "condition": None if last is None else last.condition,
            "batch_size": self._local,
            **self._ratio_ramp(),
            **self._pairs(),
            **self._with_segment(self._rollout(stage.critic_steps, None if last is None else last.real_x0)),
            **({} if last is None else {**self._image_loss(last.rows), **self._reward_loss(last.rows)}),
        }

    def finish(self) -> None:
        """Gives the networks their own size back after an iteration with batches of other shapes."""
        if self._run.networks.teacher.sample_shape != self._shape:
            self._run.networks.resize(*self._shape[1:])

    def _next(self) -> _Read:
        batch = next(self._loader)
        if batch.pixels is not None:
            self._run.networks.resize(*batch.images.shape[2:])
        images = upload(batch.images, self._device)
        labels = batch.labels if self._run.networks.teacher.num_classes else None
        condition = batch.text if batch.text is not None else labels
        return _Read(
            images if images.is_floating_point() else to_unit(images),
            None if condition is None else upload_condition(condition, self._device),
            batch.rows,
        )

    def _seed(self, stream: rng.Stream, *number: int) -> int:
        return rng.derived_seed(self._run.config.seed, stream, self._run.iteration, *number)

    def _rollout(self, number: int, real_x0: Tensor | None) -> dict[str, Rollout]:
        """How a few-step student's samples are made, the same for a whole batch; drawn on the CPU."""
        levels, settings = self._run.student.levels, self._run.config.student
        if len(levels) == 1 or self._run.stage.config.diversity.weight:
            return {}  # all steps, which is what the diversity term is for
        trained, steps, begins = (self._seed(rng.Stream.STUDENT_STEP, number, *draw) for draw in ((), (1,), (2,)))
        if settings.any_step:
            levels = levels_for(levels, 1 + steps % len(levels))
        first = self._run.student.first_trained
        last = first + trained % (len(levels) - first)
        if last and real_x0 is not None and begins % 10**6 >= settings.simulated * 10**6:
            return {"rollout": Rollout(levels[last : last + 1], real_x0)}
        return {"rollout": Rollout(levels[: last + 1])}

    def _with_segment(self, drawn: dict[str, Rollout]) -> dict[str, Any]:
        """Adds the segment of intra-segment guidance to a rollout: from its last level to the student's next one."""
        settings = self._run.stage.config.segment
        if not settings.weight:
            return dict(drawn)
        begin = drawn["rollout"].levels[-1]
        end = next((level for level in self._run.student.levels if level < begin), self._run.student.end or None)
        share = self._seed(rng.Stream.STUDENT_STEP, 0, 3) % 10**6 / 10**6
        share = settings.margin + (1 - 2 * settings.margin) * share
        middle = begin + share * ((end or 0.0) - begin)
        return {**drawn, "segment": Segment(settings.weight, begin, middle, end)}

    def _without_some_conditions(self, condition: Condition | None, number: int) -> dict[str, Condition]:
        """Condition dropout for the critic: replaces a share of the rows by "no class" or the null prompt."""
        share, none = self._run.config.condition_dropout, self._run.none
        if not share or condition is None or none is None:
            return {}
        draws = torch.Generator().manual_seed(self._seed(rng.Stream.NO_CONDITION, number))
        dropped = torch.rand(self._run.config.batch_size, generator=draws)[self._mine] < share
        return {"critic_condition": where(upload(dropped, self._device), none_like(condition, none), condition)}

    def _ratio_ramp(self) -> dict[str, float]:
        """The factor of the density ratio's warmup: it rises from 0 to 1 over `ratio.warmup` iterations in which the
        discriminator is trained.
        """
        stage = self._run.stage
        warmup = stage.config.ratio.warmup
        if not (stage.divergence.needs_ratio and warmup):
            return {}
        return {"ratio_ramp": min(1.0, age_of("discriminator", self._run.stages, self._run.iteration) / warmup)}

    def _pairs(self) -> dict[str, Pairs]:
        pairs, order, text = self._data.pairs, self._pair_order, self._run.text
        if pairs is None or order is None or not self._run.stage.config.regression.weight:
            return {}
        rows = order.rows(self._run.iteration)[self._mine]
        condition: Condition | None = pairs.labels[rows] if self._run.networks.teacher.num_classes else None
        if text is not None:
            condition = text.rows(rows % len(text.index))
        uploaded = None if condition is None else upload_condition(condition, self._device)
        noise, x0 = upload(pairs.noise(rows), self._device), upload(pairs.x0[rows], self._device)
        levels = self._run.student.levels
        if pairs.states is None:
            return {"pairs": Pairs(noise, x0, uploaded)}
        step = self._seed(rng.Stream.STUDENT_STEP, 0, 4) % len(levels)
        x_t = upload(pairs.states[rows, step - 1], self._device) if step else None
        return {"pairs": Pairs(noise, x0, uploaded, levels[step], x_t)}

    def _image_loss(self, rows: Tensor) -> dict[str, ImageLoss]:
        """The CLIP loss between the student's images and the prompts of these rows."""
        clip, text = self._run.clip, self._data.text
        if clip is None or text is None or not self._run.stage.config.clip_loss.used:
            return {}
        return {"image_loss": ImageLoss(clip, clip.encode_prompts(text.prompts(rows)))}

    def _reward_loss(self, rows: Tensor) -> dict[str, ImageLoss]:
        """Minus the preference score of the student's images for the prompts of these rows."""
        reward, text = self._run.reward, self._data.text
        if reward is None or text is None or not self._run.stage.config.reward.used:
            return {}
        return {"reward_loss": ImageLoss(reward, reward.model.encode_prompts(text.prompts(rows)))}
