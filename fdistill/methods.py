"""The table of published methods. A row names a method's two updates, what they read, and the method's settings.

A method's settings override the config's defaults, and a config file overrides both. docs/methods/NAME.md has the
method's formula and source. Updates are named as text, so that configs can be checked without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

__all__ = ["METHODS", "Method", "Option"]


@dataclass(frozen=True)
class Option:
    """A number or a switch that only some objectives read: the setting objective.NAME, passed to the student's update.

    Attributes:
        default: the default value, whose type is the setting's type.
        above: numbers must be greater than this; None allows any finite number.
    """

    default: float | bool
    above: float | None = None

    @property
    def unset(self) -> bool | None:
        """The value that means "not set", and that methods without this setting accept."""
        return False if isinstance(self.default, bool) else None


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        student: the student's update, as "module:function".
        summary: a description of one line.
        critic: the critic's update, as "module:function"; None for a method that trains the student alone.
        divergence: the default divergence; None for a method whose divergence is fixed.
        discriminator: whether it may have a GAN term or read a density ratio.
        with_gan: for a method without one, the method to suggest to those who ask for a GAN term.
        scores: whether teacher and fake score are evaluated. Otherwise the critic is only a classifier on the encoder
            of the fake-score network.
        weighting: whether the student's loss is weighted as `generator.weighting` says.
        pairs: whether it regresses on pairs of noise and the sample that the teacher's ODE makes from it.
        extra_terms: whether its update adds the terms of augmentation, diversity, segment, clip_loss, reward,
            student.noise_kl_weight and generator.gan_gradient_ratio.
        options: the settings of its objective.
        settings: values that override the defaults of `DistillConfig`, nested as in a config file.
    """

    student: str
    summary: str
    critic: str | None = "fdistill.step.critic:critic_step"
    divergence: str | None = None
    discriminator: bool = False
    with_gan: str = "f-distill"
    scores: bool = True
    weighting: bool = True
    pairs: bool = False
    extra_terms: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


_matching = partial(Method, "fdistill.step.matching:generator_step", extra_terms=True)
_NO_GAN = {"discriminator": {"gan_weight": 0.0}, "generator": {"gan_weight": 0.0}}
_LOGNORMAL = {"sampler": "lognormal", "mean": -1.2, "std": 1.2}
# SiD draws sigma = (u-th point of the Karras grid), u from the least noisy end to 0.8: up to sigma 24 of 80.
_SID_LEVELS = {"matching_levels": {"sampler": "karras", "low": 0.0, "high": 0.8}, "critic_levels": _LOGNORMAL}

METHODS: dict[str, Method] = {
    "f-distill": _matching(
        "score difference weighted by h(r) of any f-divergence, with a GAN term",
        divergence="jensen-shannon",
        discriminator=True,
        settings={"generator": {"gan_gradient_ratio": 0.3}},  # docs/convergence.md; the paper fixes a weight
    ),
    "dmd2": _matching(
        "reverse KL with a GAN head on the fake score's bottleneck, critic updated more often",
        discriminator=True,
        settings={"critic_steps": 5, "discriminator": {"source": "fake", "features": ["mid"]}},
    ),
    "decoupled-dmd": _matching(
        "DMD2 with guidance as a term of its own, at levels cleaner than the student's input",
        discriminator=True,
        settings={
            "critic_steps": 5,
            "discriminator": {"source": "fake", "features": ["mid"]},
            "augmentation": {"weight": 1.0},
        },
    ),
    "dmd": _matching(
        "reverse KL with regression on the teacher's own ODE pairs",
        with_gan="dmd2",
        pairs=True,
        settings={**_NO_GAN, "critic_steps": 1, "regression": {"weight": 0.25}},
    ),
    "diff-instruct": _matching(
        "reverse KL integrated over noise levels, nothing else",
        settings={"discriminator": {"gan_weight": 0.0}, "generator": {"gan_weight": 0.0, "weighting": "uniform"}},
    ),
    "vsd": _matching(
        "variational score distillation with a LoRA of the teacher as fake score (SwiftBrush)",
        settings={
            "critic_steps": 1,
            "discriminator": {"gan_weight": 0.0},
            "generator": {"gan_weight": 0.0, "weighting": "vsd"},
            "fake_score": {"lora_rank": 64, "lr": 1e-3},
        },
    ),
    "sim": Method(
        "fdistill.step.implicit:sim_step",
        "score implicit matching with a pseudo-Huber distance",
        weighting=False,
        options={"huber_c": Option(0.03, above=0.0)},
        settings={**_NO_GAN, **_SID_LEVELS, "critic_steps": 1},
    ),
    "sid": Method(
        "fdistill.step.implicit:sid_step",
        "score identity distillation",
        with_gan="sida",
        options={"alpha": Option(1.2)},
        settings={**_NO_GAN, **_SID_LEVELS, "critic_steps": 1},
    ),
    "sida": Method(
        "fdistill.step.implicit:sid_step",
        "score identity distillation with the channel mean of the fake score's bottleneck as discriminator",
        discriminator=True,
        options={"alpha": Option(1.0)},
        settings={
            **_SID_LEVELS,
            "critic_steps": 1,
            "discriminator": {"head": "channel-mean", "gan_weighting": "edm", "gan_weight": 1e-2},
            "generator": {"gan_weight": 1e-4},
        },
    ),
    "uni-instruct": Method(
        "fdistill.step.implicit:uni_instruct_step",
        "expanded f-divergence: score implicit matching weighted by h(r), with the term its own density adds",
        divergence="forward-kl",
        discriminator=True,
        options={"detach_weight": Option(False)},
        settings={**_SID_LEVELS, "critic_steps": 1, "generator": {"gan_weight": 1e-4}},
    ),
    "regression": Method(
        "fdistill.step.regression:regression_step",
        "regression on the teacher's own ODE pairs, nothing else: a warm-up before another method",
        critic=None,
        weighting=False,
        pairs=True,
        settings={**_NO_GAN, "regression": {"weight": 1.0}},
    ),
    "diffratio": Method(
        "fdistill.step.diffratio:diffratio_step",
        "no score networks: the gradient of a classifier of student against data over noise levels",
        critic="fdistill.step.diffratio:ratio_critic_step",
        discriminator=True,
        scores=False,
        settings={
            "discriminator": {"source": "fake", "gan_weight": 1.0},
            "generator": {"gan_weight": 0.0, "weighting": "vsd"},
        },
    ),
}


def methods_with(attribute: str) -> list[str]:
    """The names of the methods whose row has an attribute set, such as "discriminator"."""
    return [name for name, method in METHODS.items() if getattr(method, attribute)]
