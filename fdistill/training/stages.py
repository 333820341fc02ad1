"""The stages of a run as they are trained: settings, updates and rates, all of them functions of the iteration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fdistill.config.nested import leaves
from fdistill.config.schema import DistillConfig
from fdistill.divergence import Divergence
from fdistill.methods import METHODS
from fdistill.ratio import DensityRatio
from fdistill.step import ROLES, Networks
from fdistill.training.rates import is_constant, learning_rate
from fdistill.training.updates import Update, critic_update, student_update


@dataclass
class Stage:
    """A part of a run with settings of its own; a run without stages is one.

    Attributes:
        number: from 1.
        config: the stage's settings; `iterations` counts its own.
        first: the run's iteration that it starts with.
        changes: what it changes, as the config says.
        critic_update: None if the method trains the student alone.
    """

    number: int
    config: DistillConfig
    first: int
    changes: dict[str, Any]
    divergence: Divergence
    critic_update: Update | None
    student_update: Update

    @property
    def end(self) -> int:
        """The run's iteration that comes after it."""
        return self.first + self.config.iterations

    @property
    def critic_steps(self) -> int:
        """The critic's updates in each iteration."""
        return 0 if self.critic_update is None else self.config.critic_steps

    @property
    def batches(self) -> int:
        """The batches of data that an iteration reads: one for each of the critic's updates, or one for them all."""
        return min(self.critic_steps, 1) if self.config.reuse_samples else self.critic_steps

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of the roles that it trains."""
        return trained_roles(self.config)

    def describe(self) -> str:
        """A phrase that says how long it is and what it changes."""
        changes = ", ".join(f"{key}={value}" for key, value in leaves(self.changes)) or "the run's own settings"
        return f"{self.config.iterations} iterations: {changes}"

    def rate(self, role: str, iteration: int) -> float:
        """The learning rate of a role in an iteration of the run that lies in this stage."""
        return learning_rate(self.config.roles[role], iteration - self.first, self.config.iterations)


def make_stages(
    config: DistillConfig,
    networks: Networks,
    divergences: Sequence[Divergence],
    ratio: DensityRatio,
    trajectory: tuple[float, ...] = (),
) -> tuple[Stage, ...]:
    """The stages of a config; `divergences` are theirs, `trajectory` is that of `student_update`.

    Raises:
        ConfigError: an update lacks an argument.
    """
    configs = config.stage_configs()
    firsts = accumulate((each.iterations for each in configs), initial=0)
    return tuple(
        Stage(
            number,
            each,
            first,
            {key: value for key, value in changes.items() if key != "iterations"},
            divergence,
            critic_update(each, networks),
            student_update(each, networks, divergence, ratio, trajectory),
        )
        for number, (each, first, changes, divergence) in enumerate(
            zip(configs, firsts, config.stages or [{}], divergences, strict=False), 1
        )
    )


def trained_roles(config: DistillConfig) -> tuple[str, ...]:
    """The names of the roles that a stage's settings train; of a discriminator without weights too."""
    critic = METHODS[config.method].critic is not None
    trained = {"generator": True, "fake_score": critic, "discriminator": critic and config.discriminator.gan_weight > 0}
    return tuple(role for role in ROLES if trained[role])


def stage_at(stages: Sequence[Stage], iteration: int) -> Stage:
    """The stage in which an iteration lies; the last one for the end of the run."""
    return next((stage for stage in stages if iteration < stage.end), stages[-1])


def batches_before(stages: Sequence[Stage], iteration: int) -> int:
    """How many batches of data the critic's updates read in the iterations before this one."""
    return sum(done * stage.batches for stage, done in _done(stages, iteration))


def age_of(role: str, stages: Sequence[Stage], iteration: int) -> int:
    """How many of the iterations before this one trained a role."""
    return sum(done for stage, done in _done(stages, iteration) if role in stage.roles)


def _done(stages: Sequence[Stage], iteration: int) -> Iterable[tuple[Stage, int]]:
    """Each stage, and how many of its iterations come before this one."""
    return [(stage, min(max(iteration - stage.first, 0), stage.config.iterations)) for stage in stages]


def changing_rates(stages: Sequence[Stage], iteration: int, roles: Iterable[str]) -> dict[str, float]:
    """{"role/lr": the rate of an iteration}, of those of the roles that it trains whose rate changes during the run."""
    now = stage_at(stages, iteration)
    found = {}
    for role in (role for role in roles if role in now.roles):
        sections = [stage.config.roles[role] for stage in stages if role in stage.roles]
        if len({section.lr for section in sections}) > 1 or not all(is_constant(section) for section in sections):
            found[f"{role}/lr"] = now.rate(role, iteration)
    return found


def settle_ratio(ratio: DensityRatio, config: DistillConfig) -> None:
    """Gives the density ratio a stage's bounds and momentum; its bins go on."""
    ratio.lower, ratio.upper, ratio.momentum = config.ratio.lower, config.ratio.upper, config.ratio.momentum
