"""The published methods: which objective each one follows, what it may be combined with, and its default settings.

A method's settings lie between the config's own defaults and a config file. Its page, with formula and source, is
docs/methods/. No torch here, so that configs can be read and refused without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
