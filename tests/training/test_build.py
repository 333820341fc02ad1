"""From a config to networks and optimisers: who copies whom, who is guided, what heads read, what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from torch import nn

from fdistill.adapters.checkpoint import load_teacher
from fdistill.config.reading import load_config
from fdistill.discriminator import ChannelMean, Discriminator
from fdistill.guidance import GuidedDenoiser
from fdistill.training.build import build
from fdistill.training.checkpoint import own_chunks, save_checkpoint
from fdistill.training.distillation import Distillation
from support.denoisers import tiny_unet

NONE = 10
OPTIMIZERS = {
    "generator": {"lr": 1e-3, "beta1": 0.3, "beta2": 0.99, "eps": 1e-7, "weight_decay": 0.02},
    "fake_score": {"lr": 2e-3, "beta1": 0.1, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.03},
    "discriminator": {"lr": 4e-3, "beta1": 0.2, "beta2": 0.97, "eps": 1e-5, "weight_decay": 0.04},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last label stands for no class, and it has dropout, which frozen networks and students in use leave out."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    unet = tiny_unet(num_class_embeds=NONE + 1, dropout=0.5)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def built(teacher: Path, **settings: Any) -> Distillation:
    config = load_config("digits", {"teacher": str(teacher), "null_class": NONE, **settings})
    return build(config, torch.device("cpu"))


def storages(module: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


def test_fake_score_and_student_are_copies_of_the_teacher_that_train(teacher: Path) -> None:
    made = built(teacher)
    networks, stored = made.networks, load_teacher(teacher).state_dict()
    roles = (networks.teacher, networks.fake_score, made.student.denoiser)
    for role in roles:
        for name, value in role.state_dict().items():
            assert torch.equal(value, stored[name]), name
    first, second, third = (storages(role) for role in roles)
    assert not first & second
    assert not first & third
    assert not second & third
    assert not any(parameter.requires_grad for parameter in networks.teacher.parameters())
    assert all(parameter.requires_grad for role in roles[1:] for parameter in role.parameters())
    assert [role.training for role in roles] == [False, True, True]
    assert made.student.levels == (2.5,)
    assert built(teacher, student_level=None).student.levels == (80.0,)
    assert made.none == NONE


def test_every_role_has_the_optimiser_of_its_own_section(teacher: Path) -> None:
    settings = {f"{role}.{name}": value for role, values in OPTIMIZERS.items() for name, value in values.items()}
    made = built(teacher, **settings)
    assert made.optimizers.keys() == OPTIMIZERS.keys()
    for role, expected in OPTIMIZERS.items():
        (group,) = made.optimizers[role].param_groups
        found = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        assert found | dict(zip(("beta1", "beta2"), group["betas"], strict=True)) == expected
        module = getattr(made.networks, role)
        assert {p.data_ptr() for p in group["params"]} == storages(module)


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_who_is_guided_and_who_is_tapped(teacher: Path, source: str) -> None:
    """The fake score is guided by scales of its own: one beside the teacher's, one where it learns."""
    settings = {"guidance_scale": 2.0, "guidance_rescale": 0.3, "discriminator.source": source}
    settings |= {"fake_score.guidance_scale": 1.5, "fake_score.training_guidance_scale": 2.5}
    networks = built(teacher, **settings).networks
    guided = (networks.teacher, networks.compared, networks.learning)
    assert all(isinstance(network, GuidedDenoiser) for network in guided)
    assert [network.guidance_scale for network in guided] == [2.0, 1.5, 2.5]  # type: ignore[union-attr]
    assert [network.rescale for network in guided] == [0.3] * 3  # type: ignore[union-attr]
    assert networks.compared.denoiser is networks.learning.denoiser is networks.fake_score  # type: ignore[union-attr]
    assert networks.tapped is (networks.fake_score if source == "fake" else networks.teacher)
    plain = built(teacher, **{"discriminator.source": source}).networks
    assert (plain.compared, plain.learning) == (None, None)
    assert not isinstance(plain.teacher, GuidedDenoiser)
    assert plain.tapped is (plain.fake_score if source == "fake" else plain.teacher)


def test_heads_are_those_of_the_config(teacher: Path) -> None:
    both = built(teacher, **{"discriminator.features": ["down0", "mid"]}).networks.discriminator
    assert isinstance(both, Discriminator)
    assert both.features == ("down0", "mid")
    pooled = built(teacher, **{"discriminator.head": "pooled"}).networks.discriminator
    assert pooled is not None
    assert any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in pooled.modules())
    assert not any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in both.modules())
    mean = built(teacher, **{"discriminator.head": "channel-mean"}).networks.discriminator
    assert isinstance(mean, ChannelMean)
    assert built(teacher, method="sid").networks.tapped is None


def test_the_seed_decides_on_what_is_drawn(teacher: Path) -> None:
    """Which is the discriminator's weights alone."""
    heads = [built(teacher, seed=seed).networks.discriminator.state_dict() for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    assert any(not torch.equal(value, heads[2][name]) for name, value in heads[0].items())


def test_the_average_is_the_students(teacher: Path) -> None:
    made = built(teacher, **{"ema.decays": [0.5, 0.9], "ema.export": 0.9, "ema.sigma_rel": [0.1]})
    for parameter in made.networks.fake_score.parameters():
        parameter.data += 1
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter += 0.5
    before = load_teacher(teacher).state_dict()
    made.ema.update()
    assert made.ema.shadows.keys() == {0.5, 0.9, "sigma_rel=0.1"}
    for name, value in made.ema.shadows[0.9].items():
        own = before[name.removeprefix("denoiser.")]
        torch.testing.assert_close(value, own + 0.05, rtol=1e-6, atol=1e-6)


def test_frozen_weights_may_be_bfloat16_beside_trained_float32_ones(teacher: Path) -> None:
    networks = built(teacher, frozen_precision="bf16", precision="bf16").networks
    assert {p.dtype for p in networks.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for role in (networks.fake_score, networks.generator) for p in role.parameters()} == {torch.float32}


def test_activations_are_computed_again_where_the_config_says_so(teacher: Path) -> None:
    """What autograd keeps of an evaluation shrinks for every network."""

    def kept(made: Distillation, role: str) -> int:
        network: Any = made.student.denoiser if role == "student" else getattr(made.networks, role)
        sizes: dict[int, int] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        x_t = torch.randn(8, 1, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            network.denoise(x_t, torch.full((8,), 1.0), torch.arange(8))
        return sum(sizes.values())

    plain, again = (built(teacher, gradient_checkpointing=value) for value in (False, True))
    for role in ("fake_score", "student"):
        assert kept(again, role) < 0.7 * kept(plain, role), role


def test_a_state_goes_into_another_build_and_back(teacher: Path, tmp_path: Path) -> None:
    """Weights of all roles, moments of all optimisers, averages and bins."""
    settings = {"ema.decays": [0.5], "ema.export": 0.5, "ema.sigma_rel": [0.1], "ratio.momentum": 0.5}
    first, second = built(teacher, **settings), built(teacher, seed=1, **settings)
    labels, random = torch.arange(8) % 10, torch.Generator().manual_seed(0)
    for update, roles in (
        (lambda: first.critic_update(torch.zeros(8, 1, 8, 8), labels, random), ("fake_score", "discriminator")),
        (lambda: first.student_update(labels, random, batch_size=8), ("generator",)),
    ):
        update().loss.backward()
        for role in roles:
            first.optimizers[role].step()
            first.optimizers[role].zero_grad()
    first.ema.update()
    tensors = {name: value.clone() for name, value in first.state().items()}
    for prefix in ("generator.", "fake_score.", "discriminator.", "ema.0.5.", "ema.sigma_rel=0.1.", "ratio.bins"):
        assert any(name.startswith(prefix) for name in tensors), prefix
    for role in OPTIMIZERS:
        assert any(name.startswith(f"optimizer.{role}.") for name in tensors), role
    second.load_state(save_checkpoint(tmp_path, 1, own_chunks(tensors), {}, keep=1), 1)
    found = second.state()
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name
    for role in OPTIMIZERS:
        assert storages(getattr(second.networks, role)) == {
            p.data_ptr() for group in second.optimizers[role].param_groups for p in group["params"]
        }
