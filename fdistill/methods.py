"""The published methods: which objective each one follows, what it may be combined with, and its default settings.

A method's settings lie between the config's own defaults and a config file. Its page, with formula and source, is
docs/methods/. No torch here, so that configs can be read and refused without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fdistill.config.schema import DistillConfig

#: The update of the student, each a function in `fdistill.step`.
Objective = Literal["matching", "sid", "sim", "uni-instruct", "diffratio"]


@dataclass(frozen=True)
class Method:
    """One row of the registry.

    Attributes:
        objective: the student's update.
        summary: one line for people.
        divergence: the default; None for a method that has no choice of it.
        discriminator: whether it may have a GAN term or read a density ratio.
        few_step: whether students of two or four steps are supported.
        settings: over the defaults of `DistillConfig`, nested as in a config file.
    """

    objective: Objective
    summary: str
    divergence: str | None = None
    discriminator: bool = False
    few_step: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


_NO_GAN = {"discriminator": {"gan_weight": 0.0}, "generator": {"gan_weight": 0.0}}
_LOGNORMAL = {"sampler": "lognormal", "mean": -1.2, "std": 1.2}
# SiD draws sigma = (u-th point of the Karras grid), u from the least noisy end to 0.8: up to sigma 24 of 80.
_SID_LEVELS = {"matching_levels": {"sampler": "karras", "low": 0.0, "high": 0.8}, "critic_levels": _LOGNORMAL}

METHODS: dict[str, Method] = {
    "f-distill": Method(
        "matching",
        "score difference weighted by h(r) of any f-divergence, with a GAN term",
        divergence="jensen-shannon",
        discriminator=True,
        few_step=True,
    ),
    "dmd2": Method(
        "matching",
        "reverse KL with a GAN head on the fake score's bottleneck, critic updated more often",
        discriminator=True,
        few_step=True,
        settings={"critic_steps": 5, "discriminator": {"source": "fake", "features": ["mid"]}},
    ),
    "dmd": Method(
        "matching",
        "reverse KL with regression on the teacher's own ODE pairs",
        settings={**_NO_GAN, "critic_steps": 1, "regression": {"weight": 0.25}},
    ),
    "diff-instruct": Method(
        "matching",
        "reverse KL integrated over noise levels, nothing else",
        settings={"discriminator": {"gan_weight": 0.0}, "generator": {"gan_weight": 0.0, "weighting": "uniform"}},
    ),
    "vsd": Method(
        "matching",
        "variational score distillation with a LoRA of the teacher as fake score (SwiftBrush)",
        settings={
            "critic_steps": 1,
            "discriminator": {"gan_weight": 0.0},
            "generator": {"gan_weight": 0.0, "weighting": "vsd"},
            "fake_score": {"lora_rank": 64, "lr": 1e-3},
        },
    ),
    "sim": Method(
        "sim",
        "score implicit matching with a pseudo-Huber distance",
        settings={**_NO_GAN, **_SID_LEVELS, "critic_steps": 1, "objective": {"huber_c": 0.03}},
    ),
    "sid": Method(
        "sid",
        "score identity distillation",
        settings={**_NO_GAN, **_SID_LEVELS, "critic_steps": 1, "objective": {"alpha": 1.2}},
    ),
    "sida": Method(
        "sid",
        "score identity distillation with the channel mean of the fake score's bottleneck as discriminator",
        discriminator=True,
        settings={
            **_SID_LEVELS,
            "critic_steps": 1,
            "objective": {"alpha": 1.0},
            "discriminator": {"head": "channel-mean", "gan_weighting": "edm", "gan_weight": 1e-2},
            "generator": {"gan_weight": 1e-4},
        },
    ),
    "uni-instruct": Method(
        "uni-instruct",
        "expanded f-divergence: score implicit matching weighted by h(r), with the term its own density adds",
        divergence="forward-kl",
        discriminator=True,
        settings={**_SID_LEVELS, "critic_steps": 1, "generator": {"gan_weight": 1e-4}},
    ),
    "diffratio": Method(
        "diffratio",
        "no score networks: the gradient of a classifier of student against data over noise levels",
        discriminator=True,
        settings={
            "discriminator": {"source": "fake", "gan_weight": 1.0},
            "generator": {"gan_weight": 0.0, "weighting": "vsd"},
        },
    ),
}

#: Settings that only some methods read, with the value that means "not set".
OWN_SETTINGS: dict[str, tuple[tuple[str, ...], Any]] = {
    "generator.weighting": (
        tuple(name for name, method in METHODS.items() if method.objective != "sim"),
        "normalised",
    ),
    "objective.alpha": (("sid", "sida"), None),
    "objective.huber_c": (("sim",), None),
    "objective.detach_weight": (("uni-instruct",), False),
    "regression.weight": (("dmd",), 0.0),
}
#: Those of them without which the method is none.
REQUIRED_SETTINGS = ("objective.alpha", "objective.huber_c", "regression.weight")


def check_combination(config: DistillConfig) -> None:
    """Raises ValueError where a setting asks for what the method does not have, or lacks what it needs."""
    name, method = config.method, METHODS[config.method]
    for key, (owners, unset) in OWN_SETTINGS.items():
        section, _, setting = key.partition(".")
        value = getattr(getattr(config, section), setting)
        if name not in owners and value != unset:
            raise ValueError(f"{key}: got {value!r}, which method={name} does not read; it is for {', '.join(owners)}")
        if name in owners and value == unset and key in REQUIRED_SETTINGS:
            raise ValueError(f"{key}: method={name} is nothing without it; expected a number, not {unset}")
    if method.objective == "diffratio" and config.discriminator.source != "fake":
        raise ValueError(f"discriminator.source: method={name} trains the network its heads read; expected fake")
    if method.objective == "diffratio" and (config.generator.weighting == "normalised" or config.generator.gan_weight):
        raise ValueError(
            f"generator: method={name} evaluates no teacher to normalise by, and its classifier is all it follows; "
            "expected weighting=vsd or uniform, and gan_weight=0"
        )
    if method.objective == "diffratio" and config.condition_dropout:
        raise ValueError(f"condition_dropout: method={name} has no score that could learn it; expected 0")
    if name == "dmd" and not config.regression.pairs:
        raise ValueError("regression.pairs: method=dmd regresses on teacher pairs; expected a number above 0")
    if method.divergence is None and config.divergence is not None:
        choosing = ", ".join(other for other, entry in METHODS.items() if entry.divergence)
        raise ValueError(f"divergence: method={name} has no choice of it; expected null, or method={choosing}")
    if not method.discriminator:
        for role in ("generator", "discriminator"):
            weight = getattr(config, role).gan_weight
            if weight > 0:
                adversarial = {"sid": "sida", "dmd": "dmd2"}.get(name, "f-distill")
                raise ValueError(
                    f"{role}.gan_weight: got {weight}, but method={name} has no discriminator; expected 0, "
                    f"or method={adversarial}"
                )
        for setting in ("source", "features", "head", "gan_weighting", "r1_weight"):
            value, default = getattr(config.discriminator, setting), getattr(type(config.discriminator)(), setting)
            if value != default:
                able = ", ".join(other for other, entry in METHODS.items() if entry.discriminator)
                raise ValueError(
                    f"discriminator.{setting}: got {value!r}, but method={name} has no discriminator; leave it out, "
                    f"or choose a method that has one: {able}"
                )
    if config.frozen_precision == "bf16" and config.precision != "bf16":
        raise ValueError(
            "frozen_precision: bf16 weights are computed with in bf16; expected precision=bf16 as well, or fp32"
        )
    generator = config.generator
    if generator.gan_gradient_ratio and not (method.objective == "matching" and generator.gan_weight):
        raise ValueError(
            f"generator.gan_gradient_ratio: got {generator.gan_gradient_ratio}, but method={name} with "
            f"generator.gan_weight={generator.gan_weight} has no GAN term beside matching; expected 0"
        )
    _check_student(config, method)
    if config.discriminator.head == "channel-mean" and config.discriminator.source != "fake":
        raise ValueError("discriminator.source: the channel-mean head has no weights to train; expected fake")
    levels = config.student_levels or ()
    if isinstance(config.student_level, list) and config.student.generator == "denoiser":
        if len(levels) not in (1, 2, 4) or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"student_level: got {list(levels)}; expected 1, 2 or 4 falling levels, as in [80.0, 2.5]")
        if len(levels) > 1 and not method.few_step:
            able = " or ".join(other for other, entry in METHODS.items() if entry.few_step)
            raise ValueError(
                f"student_level: method={name} trains one-step students; expected one level, or method={able}"
            )


def _check_student(config: DistillConfig, method: Method) -> None:
    student, name = config.student, config.method
    if student.lora_rank and (student.checkpoint or student.network):
        raise ValueError(
            f"student.lora_rank: got {student.lora_rank}, but adapters are on the teacher's own weights; expected 0, "
            "or neither student.checkpoint nor student.network"
        )
    if student.lora_rank and config.ema.snapshot_every:
        raise ValueError("ema.snapshot_every: snapshots are of whole networks; expected 0 with student.lora_rank")
    if student.noise_kl_weight and student.generator != "tiue":
        raise ValueError("student.noise_kl_weight: is of the noise that tiue's decoders predict; expected 0")
    beyond = {"student.noise_kl_weight": student.noise_kl_weight, "clip_loss.weight": config.clip_loss.weight}
    for key, value in beyond.items():
        if value and method.objective != "matching":
            raise ValueError(f"{key}: got {value}, which method={name} does not add; expected 0, or method=f-distill")
    if student.generator == "tiue" and config.regression.weight:
        raise ValueError("regression.weight: the teacher's pairs are of a student of one level; expected 0 with tiue")
