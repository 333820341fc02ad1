"""Activations computed again: fewer bytes are kept for the gradient, and the gradient is the same; in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fdistill import load_teacher
from fdistill.base import devices
from fdistill.base.errors import ConfigError
from fdistill.condition import Condition, TextCondition
from fdistill.denoiser import Denoiser
from fdistill.training.activation_checkpointing import _contexts, checkpoint_activations
from support.activations import kept_bytes
from support.families import FAMILIES
from support.text_families import TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.thorough import at_night

WRITERS: dict[str, Callable[[Path], Path]] = {
    name: family[0] for families in (FAMILIES, TEXT_FAMILIES, TEXT_FAMILIES_DIT) for name, family in families.items()
}
#: Tried by day: networks that differ the most.
BY_DAY = ("ddpm", "edm-ddpmpp", "edm2", "dit", "sd15", "sd3", "flux-dev", "sana", "qwen-image", "z-image")


def condition_of(denoiser: Denoiser, count: int) -> Condition | None:
    torch.manual_seed(2)
    if denoiser.text_shapes is not None:
        return TextCondition({name: torch.rand(count, *shape) for name, shape in denoiser.text_shapes.items()})
    return torch.arange(count) % denoiser.num_classes if denoiser.num_classes else None


def kept_and_gradient(denoiser: Denoiser, evaluate: Callable[[Tensor, Tensor, Condition | None], Tensor]) -> Any:
    """Bytes of the activations that are kept for backward, and the gradient of every parameter that has one."""
    torch.manual_seed(1)
    x_t, t = torch.randn(2, *denoiser.sample_shape), torch.full((2,), 0.7 * denoiser.schedule.t_max)
    denoiser.zero_grad()
    condition = condition_of(denoiser, 2)
    kept, loss = kept_bytes(denoiser, lambda: evaluate(x_t, t, condition).float().square().sum())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
    return kept, gradients


@pytest.mark.parametrize("name", at_night(WRITERS, lambda name: name not in BY_DAY))
def test_fewer_bytes_are_kept_and_gradients_are_the_same(name: str, tmp_path: Path) -> None:
    denoiser = load_teacher(WRITERS[name](tmp_path / "teacher")).requires_grad_(True).train()
    if denoiser.text_shapes is not None:
        denoiser.resize(8, 8)
    last = list(denoiser.feature_shapes)[-1]
    evaluations: dict[str, Callable[[Tensor, Tensor, Condition | None], Tensor]] = {
        "output": lambda x_t, t, condition: denoiser.predict(x_t, t, condition)[0].output,
        "features beside an output": lambda x_t, t, condition: denoiser.predict(
            x_t, t, condition, (last,), output_grad=False
        )[1][last],
        "features alone": lambda x_t, t, condition: denoiser.features(x_t, t, condition, (last,))[last],
    }
    plain = {what: kept_and_gradient(denoiser, evaluate) for what, evaluate in evaluations.items()}
    checkpoint_activations(denoiser)
    for what, evaluate in evaluations.items():
        (before, expected), (after, gradients) = plain[what], kept_and_gradient(denoiser, evaluate)
        assert after < 0.8 * before, f"{what}: {before} bytes, {after} with activations computed again"
        assert gradients.keys() == expected.keys(), what
        assert any(gradient.any() for gradient in gradients.values()), what
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6, msg=f"{what}: {key}")


def test_products_are_recomputed_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without instructions for bfloat16, where they are float32's inside autocast, which backward is not."""
    monkeypatch.setattr(devices, "computes_bfloat16", lambda: False)
    torch.manual_seed(0)
    block, x = torch.nn.Linear(4, 4), torch.randn(2, 4)

    def recomputed() -> Any:
        return _contexts(block)

    gradients = []
    for kept in (True, False):
        block.zero_grad()
        with devices.autocast(torch.device("cpu"), "bf16"):
            output = block(x) if kept else checkpoint(block, x, use_reentrant=False, context_fn=recomputed)
        output.square().sum().backward()
        assert block.weight.grad is not None
        gradients.append(block.weight.grad.clone())
    assert torch.equal(*gradients)


def test_networks_that_cannot_say_so(tiny_teacher: Path) -> None:
    denoiser = load_teacher(tiny_teacher)
    denoiser.network._supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: UNet2DModel does not support it; expected false"):
        checkpoint_activations(denoiser)
