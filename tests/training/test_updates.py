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
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.losses import denoising_weight
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
from fdistill.training.build import build
from fdistill.training.distillation import Distillation
from support.denoisers import tiny_unet
from support.thorough import at_night

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
    **{name: ({"fake_score.weighting": name}, {"weighting": name}) for name in ("inverse-sigma2", "v", "flow")},
    "gamma": (
        {"fake_score.weighting": "min-snr", "fake_score.min_snr_gamma": 1.5},
        {"weighting": "min-snr", "min_snr_gamma": 1.5},
    ),
    "gan weight": ({"discriminator.gan_weight": 0.3}, {"gan_weight": 0.3}),
    "gan weighting": ({"discriminator.gan_weighting": "edm"}, {"gan_weighting": "edm"}),
    "shared noise": ({"discriminator.shared_noise": True}, {"shared_noise": True}),
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


#: Other values of settings that another row has too.
OTHER_VALUES = ("v", "flow", "r1", "karras", "uniform", "shifted")


@pytest.mark.parametrize("name", at_night(CRITIC_SETTINGS, OTHER_VALUES.__contains__))
def test_settings_of_the_critic_reach_its_step(tiny_teacher: Path, name: str) -> None:
    settings, options = CRITIC_SETTINGS[name]
    made = built(tiny_teacher, **settings)
    by_hand: dict[str, Any] = {
        "levels": CRITIC,
        "weighting": "edm",
        "min_snr_gamma": 5.0,
        "gan_weight": 1e-2,
        "gan_weighting": "uniform",
        "shared_noise": False,
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
    "f-distill": (
        generator_step,
        {"levels": MATCHING, "weighting": "normalised", "gan_weight": 1e-3, "gan_gradient_ratio": 0.3},
    ),
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
    ("f-distill", {"generator.gan_weight": 0.3}, {"gan_weight": 0.3, "gan_gradient_ratio": 0.0}),
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


#: What is tried by day of methods other than f-distill: what it does not have, or one setting where it has all.
BY_DAY = {
    "dmd": "regression.weight",
    "sid": "objective.alpha",
    "sim": "objective.huber_c",
    "uni-instruct": "divergence",
    "diffratio": "generator.weighting",
}


def _waits(row: tuple[str, dict[str, Any], dict[str, Any]]) -> bool:
    method, settings, _ = row
    first = next(iter(settings))
    if method == "f-distill":  # others of the ratio and of the levels are tried by day
        return first in ("ratio.lower", "ratio.momentum", "matching_levels")
    return first != BY_DAY.get(method)


@pytest.mark.parametrize(
    ("method", "settings", "options"), at_night(STUDENT_SETTINGS, _waits), ids=lambda value: str(value)[:40]
)
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
        ({}, {"student_level": [2.5, 0.5]}, "takes no rollout, .* it must have one level"),
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


def unet_teacher(folder: Path, kind: str) -> Path:
    """An untrained teacher that predicts `kind`."""
    torch.manual_seed(0)
    tiny_unet().save_pretrained(folder / "unet")
    scheduler = FlowMatchEulerDiscreteScheduler()
    if kind != "flow":
        scheduler = DDIMScheduler(prediction_type={"v": "v_prediction", "eps": "epsilon"}[kind], clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


#: What a network predicts -> the name of the loss with which such networks are trained, and its target.
TARGETS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "eps": ("inverse-sigma2", lambda alpha, sigma, x0, eps: eps),
    "v": ("v", lambda alpha, sigma, x0, eps: alpha * eps - sigma * x0),
    "flow": ("flow", lambda alpha, sigma, x0, eps: eps - x0),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("named", [False, True])
def test_the_fake_score_learns_by_the_loss_of_its_networks_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, named: bool
) -> None:
    """The whole update against the published loss, the squared error of what the network itself predicts."""
    name, target = TARGETS[kind]
    settings = {"student_level": None, "discriminator.gan_weight": 0.0, "generator.gan_weight": 0.0}
    settings |= {"divergence": "reverse-kl", "critic_levels": {"sampler": "uniform", "low": 0.1, "high": 0.9}}
    settings |= {"fake_score.weighting": name} if named else {}
    made = built(unet_teacher(tmp_path / kind, kind), **settings)
    seen: dict[str, Any] = {}
    predict, draw = made.networks.fake_score.predict, made.networks.generator.forward

    def predicting(x_t: Tensor, t: Tensor, *rest: Any, **more: Any) -> Any:
        prediction, features = predict(x_t, t, *rest, **more)
        seen.update(x_t=x_t, t=t, output=prediction.output)
        return prediction, features

    def drawing(*rest: Any, **more: Any) -> Tensor:
        seen["x0"] = draw(*rest, **more)
        return seen["x0"]

    monkeypatch.setattr(made.networks.fake_score, "predict", predicting)
    monkeypatch.setattr(made.networks.generator, "forward", drawing)
    torch.manual_seed(0)
    result = made.critic_update(real_x0(), LABELS, torch.Generator().manual_seed(3))
    schedule, x_t, x0 = made.networks.teacher.schedule, seen["x_t"], seen["x0"]
    alpha, sigma = (value(seen["t"]).reshape(-1, 1, 1, 1) for value in (schedule.alpha, schedule.sigma))
    expected = (seen["output"] - target(alpha, sigma, x0, (x_t - alpha * x0) / sigma)).square().mean()
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=0)
    # And its gradient is that of the published loss.
    weights = list(made.networks.fake_score.parameters())
    for found, exact in zip(
        *(torch.autograd.grad(loss, weights, retain_graph=True) for loss in (result.loss, expected)), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item() + 1e-8)


def test_edms_weight_gives_an_eps_network_mostly_its_noisiest_levels(tmp_path: Path) -> None:
    """Why the default is the network's own loss: EDM's weight is 1 + 4 (sigma / alpha)^2 times that of eps."""
    schedule = built(unet_teacher(tmp_path / "eps", "eps")).networks.teacher.schedule
    t = torch.linspace(1.0, 999.0, 999)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    share = denoising_weight("edm", alpha, sigma) / denoising_weight("inverse-sigma2", alpha, sigma)
    torch.testing.assert_close(share, 1 + 4 * (sigma / alpha).square())
    assert share[t > 900].sum() > 0.8 * share.sum()
    v = denoising_weight("edm", alpha, sigma) / denoising_weight("v", alpha, sigma)
    assert v.min() >= 1 - 1e-4
    assert v.max() <= 4 + 1e-4
