"""A config's updates are the steps with the settings it names: the same numbers as the step called with them by hand.

Equal to the last bit, since the same operations run on the same numbers; and each setting changes the loss, so that
none is lost on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.methods import METHODS, Method
from fdistill.noise import karras_levels, lognormal_levels, shifted_levels, uniform_levels
from fdistill.ratio import DensityRatio
from fdistill.step import (
    Pairs,
    critic_step,
    diffratio_step,
    generator_step,
    ratio_critic_step,
    sid_step,
    sim_step,
    uni_instruct_step,
)
from fdistill.training.build import Distillation, build

LABELS = torch.arange(6) % 10
#: The digits config's own levels, of the critic and of the student.
CRITIC, MATCHING = partial(karras_levels, low=0.0, high=0.7), partial(karras_levels, low=0.02, high=0.65)
LEVELS: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "karras": ({"low": 0.1, "high": 0.5, "rho": 3.0}, partial(karras_levels, low=0.1, high=0.5, rho=3.0)),
    "uniform": ({"low": 0.01, "high": 0.05}, partial(uniform_levels, low=0.01, high=0.05)),
    "shifted": ({"low": 0.01, "high": 0.04, "shift": 2.0}, partial(shifted_levels, low=0.01, high=0.04, shift=2.0)),
    "lognormal": ({"mean": 0.3, "std": 0.5}, partial(lognormal_levels, mean=0.3, std=0.5)),
}


def built(teacher: Path, **settings: Any) -> Distillation:
    """With a fake score and a student that are no longer the teacher's copies."""
    made = build(load_config("digits", {"teacher": str(teacher), **settings}), torch.device("cpu"))
    random = torch.Generator().manual_seed(1)
    for network in (made.networks.fake_score, made.networks.generator):
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return made


def real_x0() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1


def loss_of(update: Callable[..., Any], *inputs: Any, **options: Any) -> float:
    torch.manual_seed(0)
    loss: float = update(*inputs, torch.Generator().manual_seed(3), **options).loss.item()
    return loss


CRITIC_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weighting": ({"fake_score.weighting": "inverse-sigma2"}, {"weighting": "inverse-sigma2"}),
    "gamma": (
        {"fake_score.weighting": "min-snr", "fake_score.min_snr_gamma": 1.5},
        {"weighting": "min-snr", "min_snr_gamma": 1.5},
    ),
    "gan weight": ({"discriminator.gan_weight": 0.3}, {"gan_weight": 0.3}),
    "gan weighting": ({"discriminator.gan_weighting": "edm"}, {"gan_weighting": "edm"}),
    "r1": ({"discriminator.r1_weight": 5.0}, {"r1_weight": 5.0}),
    "approximate r1": (
        {"discriminator": {"r1_weight": 5.0, "r1": "approximate", "r1_sigma": 0.2}},
        {"r1_weight": 5.0, "r1_sigma": 0.2},
    ),
    **{
        name: ({"critic_levels": {"sampler": name, **given}}, {"levels": levels})
        for name, (given, levels) in LEVELS.items()
    },
}


@pytest.mark.parametrize("name", CRITIC_SETTINGS)
def test_settings_of_the_critic_reach_its_step(tiny_teacher: Path, name: str) -> None:
    settings, options = CRITIC_SETTINGS[name]
    made = built(tiny_teacher, **settings)
    by_hand: dict[str, Any] = {
        "levels": CRITIC,
        "weighting": "edm",
        "min_snr_gamma": 5.0,
        "gan_weight": 1e-2,
        "gan_weighting": "uniform",
        "r1_weight": 0.0,
        "r1_sigma": None,
    }
    step = partial(critic_step, made.networks)
    found = loss_of(made.critic_update, real_x0(), LABELS)
    assert found == loss_of(step, real_x0(), LABELS, **{**by_hand, **options})
    for option in options.keys() - {"weighting"} if name == "gamma" else options:
        assert found != loss_of(step, real_x0(), LABELS, **{**by_hand, **options, option: by_hand[option]}), option


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"discriminator.r1_weight": 5.0}, {"r1_weight": 5.0}),
        (
            {"discriminator": {"r1_weight": 5.0, "r1": "approximate"}},
            {"r1_weight": 5.0, "r1_sigma": 0.1},
        ),
        ({"critic_levels": {"sampler": "lognormal", "mean": 0.3}}, {"levels": partial(lognormal_levels, mean=0.3)}),
    ],
    ids=["r1", "approximate r1", "levels"],
)
def test_settings_of_diffratios_classifier_reach_its_step(
    tiny_teacher: Path, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    made = built(tiny_teacher, method="diffratio", **settings)
    by_hand = {"levels": CRITIC, "r1_weight": 0.0}
    found = loss_of(made.critic_update, real_x0(), LABELS)
    assert found == loss_of(partial(ratio_critic_step, made.networks), real_x0(), LABELS, **{**by_hand, **options})
    assert found != loss_of(partial(ratio_critic_step, made.networks), real_x0(), LABELS, **by_hand)


NOISE, X0 = torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(4))
PAIRS = {"pairs": Pairs(NOISE, X0, LABELS)}
BY_HAND: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "f-distill": (generator_step, {"levels": MATCHING, "weighting": "normalised", "gan_weight": 1e-3}),
    "dmd": (generator_step, {"levels": MATCHING, "gan_weight": 0.0, "regression_weight": 0.25, **PAIRS}),
    "vsd": (generator_step, {"levels": MATCHING, "gan_weight": 0.0, "weighting": "vsd"}),
    "sid": (sid_step, {"levels": MATCHING, "alpha": 1.2, "weighting": "normalised"}),
    "sida": (
        sid_step,
        {"levels": MATCHING, "alpha": 1.0, "weighting": "normalised", "gan_weight": 1e-4},
    ),
    "sim": (sim_step, {"levels": MATCHING, "huber_c": 0.03}),
    "uni-instruct": (uni_instruct_step, {"levels": MATCHING, "gan_weight": 1e-4}),
    "diffratio": (diffratio_step, {"levels": MATCHING, "weighting": "vsd"}),
}
#: A method, the config's settings over it, what they are to the step, and what they would be if they were lost.
STUDENT_SETTINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("f-distill", {"generator.weighting": "uniform"}, {"weighting": "uniform"}),
    ("f-distill", {"generator.gan_weight": 0.3}, {"gan_weight": 0.3}),
    ("f-distill", {"generator.gan_gradient_ratio": 0.5}, {"gan_gradient_ratio": 0.5}),
    ("f-distill", {"divergence": "kl"}, {"divergence": "kl"}),
    ("f-distill", {"ratio.upper": 1.0}, {"ratio": {"upper": 1.0}}),
    ("f-distill", {"ratio.lower": 1.0}, {"ratio": {"lower": 1.0}}),
    ("f-distill", {"ratio.num_bins": 1}, {"ratio": {"num_bins": 1}}),
    ("f-distill", {"ratio.momentum": 0.9}, {"ratio": {"momentum": 0.9}}),
    (
        "f-distill",
        {"ratio.bin_edges": "linear", "matching_levels.high": 1.0},
        {"ratio": {"bin_edges": "linear"}, "levels": partial(karras_levels, low=0.02, high=1.0)},
    ),
    ("dmd", {"regression.weight": 0.6}, {"regression_weight": 0.6}),
    ("vsd", {"generator.weighting": "uniform", "fake_score.lora_rank": 0}, {"weighting": "uniform"}),
    ("sid", {"objective.alpha": 0.7}, {"alpha": 0.7}),
    ("sid", {"generator.weighting": "vsd"}, {"weighting": "vsd"}),
    ("sida", {"generator.gan_weight": 0.3}, {"gan_weight": 0.3}),
    ("sim", {"objective.huber_c": 0.5}, {"huber_c": 0.5}),
    ("uni-instruct", {"generator.gan_weight": 0.3}, {"gan_weight": 0.3}),
    ("uni-instruct", {"generator.weighting": "uniform"}, {"weighting": "uniform"}),
    ("uni-instruct", {"divergence": "js"}, {"divergence": "js"}),
    ("diffratio", {"generator.weighting": "uniform"}, {"weighting": "uniform"}),
    *(
        (method, {"matching_levels": {"sampler": name, **given}}, {"levels": levels})
        for method, name in (
            ("f-distill", "karras"),
            ("sid", "uniform"),
            ("sim", "shifted"),
            ("diffratio", "lognormal"),
        )
        for given, levels in [LEVELS[name]]
    ),
]


@pytest.mark.parametrize(("method", "settings", "options"), STUDENT_SETTINGS, ids=lambda value: str(value)[:40])
def test_settings_of_the_student_reach_its_step(
    tiny_teacher: Path, method: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {"fake_score.lora_rank": 0, "discriminator.features": ["mid"], **settings}
    made = built(tiny_teacher, method=method, **settings)
    step, by_hand = BY_HAND[method]
    with_ratio = method in ("f-distill", "uni-instruct")
    default = {"f-distill": "jensen-shannon", "uni-instruct": "forward-kl"}.get(method)

    def called(options: dict[str, Any]) -> float:
        options = {**by_hand, "batch_size": 6, **options}
        if with_ratio:
            bounds = {"sigma_min": 0.002, "sigma_max": 80.0, **options.get("ratio", {})}
            options |= {"ratio": DensityRatio(**bounds), "divergence": options.get("divergence", default)}
        return loss_of(partial(step, made.networks), LABELS, **options)

    rest = PAIRS if method == "dmd" else {}
    found = loss_of(made.student_update, LABELS, batch_size=6, **rest)
    assert found == called(options)
    for lost in options:
        assert found != called({name: value for name, value in options.items() if name != lost}), lost


def test_uni_instructs_weight_is_detached_where_the_config_says_so(tiny_teacher: Path) -> None:
    """Which its gradient alone shows."""
    gradients: list[list[Tensor]] = []
    for settings, options in (({}, {}), ({"objective.detach_weight": True}, {"detach_weight": True})):
        made = built(tiny_teacher, method="uni-instruct", **settings)
        step, by_hand = BY_HAND["uni-instruct"]
        ratio = DensityRatio(sigma_min=0.002, sigma_max=80.0)
        for update in (
            made.student_update,
            partial(step, made.networks, **by_hand, **options, divergence="forward-kl", ratio=ratio),
        ):
            torch.manual_seed(0)
            loss = update(LABELS, torch.Generator().manual_seed(3), batch_size=6).loss
            gradients.append(list(torch.autograd.grad(loss, list(made.student.parameters()))))
    for config, by_hand in ((gradients[0], gradients[1]), (gradients[2], gradients[3])):
        assert all(torch.equal(a, b) for a, b in zip(config, by_hand, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


def own_step(networks: Any, condition: Any, generator: Any, *, batch_size: int, divergence: Any, ratio: Any) -> None:
    """A student's update that reads a ratio, and none of the arguments that only some settings add."""


def own_critic(networks: Any, real_x0: Any, condition: Any, generator: Any) -> None:
    """A critic's update that reads no more than every critic is given."""


def incomplete_step(networks: Any, condition: Any, generator: Any) -> None:
    """A student's update that does not know how many samples to draw."""


OWN = {
    "student": f"{__name__}:own_step",
    "critic": f"{__name__}:own_critic",
    "summary": "reads a ratio",
    "divergence": "kl",
    "discriminator": True,
    "few_step": True,
}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({}, {"ratio.warmup": 5}, "own_step takes no ratio_ramp, .*; without it, ratio.warmup must be 0"),
        (
            {"pairs": True},
            {"regression.weight": 0.5},
            "own_step takes no pairs, .*; without it, regression.weight must be 0",
        ),
        ({}, {"student_level": [2.5, 0.5]}, "takes no student_steps, .* it must have one level"),
        ({}, {"condition_dropout": 0.1, "null_class": 9}, "own_critic takes no critic_condition, .* must be 0"),
        ({"student": f"{__name__}:incomplete_step"}, {}, "incomplete_step takes no batch_size, which is the number of"),
        ({"critic": f"{__name__}:incomplete_step"}, {}, "incomplete_step takes no real_x0, which is the batch of data"),
        ({}, {}, None),
    ],
)
def test_a_step_that_lacks_an_argument_is_refused_before_the_run(
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, Any],
    settings: dict[str, Any],
    message: str | None,
) -> None:
    monkeypatch.setitem(METHODS, "own", Method(**{**OWN, **row}))
    config = load_config("digits", {"teacher": str(tiny_teacher), "method": "own", "ratio.warmup": 0, **settings})
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        build(config, torch.device("cpu"))
