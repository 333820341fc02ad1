"""Updates on fake tensors, which have shapes and devices but no values: whatever would make a host wait for a device to
read one is an error, and on fake CUDA tensors so is one left on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdistill.base import rng
from fdistill.base.devices import autocast
from fdistill.config.sections import OptimizerConfig
from fdistill.ema import EMA
from fdistill.losses import denoising_loss, matching_loss
from fdistill.noise import noise_to_signal_range
from fdistill.ratio import DensityRatio
from fdistill.step import (
    StepResult,
    critic_step,
    diffratio_step,
    generator_step,
    ratio_critic_step,
    sid_step,
    sim_step,
    uni_instruct_step,
)
from fdistill.training.optimise import Role
from fdistill.training.parts import Split, backward
from support.networks import real_networks
from support.thorough import at_night

BATCH = 6


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Inside, tensors are fake, and what a step draws is on the device, which need not be there."""
    device = torch.device(request.param)

    def moved(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: draw(*arguments).to(device)

    for name in ("normal", "uniform", "device_seed"):
        monkeypatch.setattr(rng, name, moved(getattr(rng, name)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield device


STEPS: dict[str, Callable[..., StepResult]] = {
    "f-distill": lambda n, labels, draws: generator_step(
        n, labels, draws, divergence="js", ratio=DensityRatio(momentum=0.5), batch_size=BATCH, ratio_ramp=0.5
    ),
    "diff-instruct": lambda n, labels, draws: generator_step(
        n, labels, draws, batch_size=BATCH, weighting="vsd", gan_weight=0.0
    ),
    "sida": lambda n, labels, draws: sid_step(n, labels, draws, batch_size=BATCH, gan_weight=0.1),
    "sim": lambda n, labels, draws: sim_step(n, labels, draws, batch_size=BATCH),
    "uni-instruct": lambda n, labels, draws: uni_instruct_step(
        n, labels, draws, batch_size=BATCH, divergence="alpha(0.3)", ratio=DensityRatio()
    ),
    "diffratio": lambda n, labels, draws: diffratio_step(n, labels, draws, batch_size=BATCH),
    "critic": lambda n, labels, draws: critic_step(n, images(labels), labels, draws),
    "critic with r1": lambda n, labels, draws: critic_step(n, images(labels), labels, draws, r1_weight=0.1),
    "ratio critic": lambda n, labels, draws: ratio_critic_step(n, images(labels), labels, draws),
}


def images(labels: Tensor) -> Tensor:
    return torch.zeros(BATCH, 1, 8, 8, device=labels.device)


def step(name: str, device: torch.device, precision: str) -> tuple[StepResult, torch.nn.Module]:
    """The result, and what it trains."""
    with device:
        networks = real_networks("fake" if name != "diff-instruct" else "teacher")
    with unset_fake_temporarily():
        noise_to_signal_range(networks.teacher.schedule)  # a constant, computed once on the host
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    with autocast(device, precision):
        result = STEPS[name](networks, labels, torch.Generator())
    for logged in result.logs.values():
        assert logged.value.shape == logged.t.shape == (BATCH,)
        assert not logged.value.requires_grad
    return result, networks.fake_score if "critic" in name else networks.generator


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("precision", at_night(["fp32", "bf16"], lambda precision: precision == "fp32"))
@pytest.mark.parametrize("name", at_night(STEPS, lambda name: name not in ("f-distill", "critic")))
def test_an_update_reads_nothing_back(name: str, precision: str, device: torch.device) -> None:
    result, module = step(name, device, precision)
    backward(lambda **_: result, {}, torch.Generator(), Split(1, "fp32"))
    assert any(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", at_night(["diff-instruct", "critic"], lambda name: name == "critic"))
def test_what_follows_the_backward_pass_reads_nothing_back(name: str, device: torch.device) -> None:
    """It is the same for every step: float32 gradients of one of the two modules that steps train."""
    result, module = step(name, device, "fp32")
    result.loss.backward()
    role = Role(module, torch.optim.AdamW(module.parameters(), fused=True))
    role.settle(OptimizerConfig(), 1e-4)
    role.step()
    EMA(module, [0.9, 0.99]).update()


def fake_cuda_works() -> bool:
    """Older versions of torch ask for a driver even where tensors are fake."""
    try:
        with FakeTensorMode():
            torch.nn.Conv2d(1, 1, 1, device="cuda")
    except RuntimeError:
        return False
    return True


# Autograd would ask for the GPU itself, so these are steps whose forward part has no backward pass in it.
@pytest.mark.skipif(not fake_cuda_works(), reason="this torch makes no fake CUDA tensors without a driver")
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    "name",
    at_night(
        ["f-distill", "critic", "diff-instruct", "sida", "sim", "ratio critic"],
        lambda name: name not in ("f-distill", "critic"),
    ),
)
def test_a_step_stays_on_its_device(name: str, device: torch.device) -> None:
    result, _ = step(name, device, "fp32")
    assert result.loss.device.type == "cuda"
    assert all(value.device.type == "cuda" for logged in result.logs.values() for value in logged)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_read_would_be_seen(device: torch.device) -> None:
    with pytest.raises(DataDependentOutputException):
        bool(torch.zeros(3).sum() > 0)


class Launches(TorchDispatchMode):
    """Names of the operators that would launch something, outside networks, by the size of what they touch."""

    VIEWS = frozenset({"view", "expand", "detach", "slice", "select", "unbind", "_unsafe_view", "t", "alias", "split"})

    def __init__(self, sample_elements: int):
        super().__init__()
        self.sample_elements, self.paused = sample_elements, False
        self.samples: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.paused and name not in self.VIEWS and "empty" not in name:
            sizes = [leaf.numel() for leaf in tree_leaves((args, results)) if isinstance(leaf, Tensor)]
            (self.samples if max(sizes, default=0) >= self.sample_elements else self.others).append(name)
        return results

    def without(self, module: torch.nn.Module, method: str) -> None:
        inner = getattr(module, method)

        def unseen(*arguments: Any, **options: Any) -> Any:
            self.paused = True
            try:
                return inner(*arguments, **options)
            finally:
                self.paused = False

        setattr(module, method, unseen)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_loss_s_backward_pass_is_one_operator(backend: str) -> None:
    """Nothing is filled with zeros for what has no gradient."""
    if backend == "triton":
        pytest.importorskip("triton")
    x0 = torch.randn(4, 3, 8, 8, requires_grad=True)
    other, weight = torch.randn(4, 3, 8, 8), torch.ones(4)
    for loss in (
        matching_loss(x0, other, -other, weight=weight, backend=backend),
        denoising_loss(x0, other, weight, backend=backend),
    ):
        upstream = torch.ones(4)
        with Launches(4 * 3 * 8 * 8) as launches:
            torch.autograd.grad(loss, x0, upstream)
        assert launches.samples == ["scale_rows"]
        assert launches.others == []


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_tail_of_a_generator_step_is_four_operators(backend: str) -> None:
    """From the student's output to loss and gradient: x0, noise, weights, loss. One process, samples of one block."""
    if backend == "triton":
        pytest.importorskip("triton")
    networks = real_networks("fake")
    launches = Launches(BATCH * 64)
    for denoiser in (networks.teacher, networks.fake_score, networks.generator.denoiser):
        launches.without(denoiser, "run")
    launches.without(networks.discriminator, "forward")
    options = {"divergence": "js", "ratio": DensityRatio(), "batch_size": BATCH, "gan_weight": 0.0}
    with launches:
        generator_step(networks, torch.zeros(BATCH, dtype=torch.long), torch.Generator(), backend=backend, **options)
    drawn = launches.samples.index("to_x0")  # before it: the student's noise, scaled
    assert launches.samples[drawn:] == ["to_x0", "renoise_seeded", "matching"]
    assert launches.others.count("ratio") == 1
