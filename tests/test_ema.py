from __future__ import annotations

import pytest
import torch
from torch import nn

from fdistill.base.errors import ArgumentError
from fdistill.ema import EMA


def test_several_decays_against_the_closed_form() -> None:
    module = nn.Linear(3, 2, dtype=torch.float64)
    start = module.weight.detach().clone()
    ema = EMA(module, [0.5, 0.9])
    values = [torch.randn_like(start) for _ in range(5)]
    for value in values:
        module.weight.data.copy_(value)
        ema.update()
    for decay in (0.5, 0.9):
        expected = decay**5 * start + sum((1 - decay) * decay ** (4 - k) * value for k, value in enumerate(values))
        torch.testing.assert_close(ema.shadows[decay]["weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_shadows_of_low_precision_weights_are_float32_and_keep_small_updates() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    module.weight.data.fill_(1.0)
    ema = EMA(module, [0.999])
    module.weight.data.fill_(1.0078125)  # the next bfloat16
    for _ in range(10):
        ema.update()
    shadow = ema.shadows[0.999]["weight"]
    assert shadow.dtype == torch.float32
    assert 1.00005 < shadow.item() < 1.0001


def test_applied_weights_come_and_go() -> None:
    module = nn.Linear(2, 2)
    ema = EMA(module, [0.5])
    before = module.weight.detach().clone()
    module.weight.data += 1
    ema.update()
    own = module.weight.detach().clone()
    with ema.applied(0.5):
        torch.testing.assert_close(module.weight.detach(), before + 0.5)
    assert torch.equal(module.weight.detach(), own)


def test_integer_buffers_are_copied() -> None:
    module = nn.BatchNorm1d(2)
    ema = EMA(module, [0.9])
    module.num_batches_tracked += 7
    ema.update()
    assert ema.shadows[0.9]["num_batches_tracked"].item() == 7


def test_state_comes_back_and_must_fit() -> None:
    module = nn.Linear(2, 2)
    ema, other = EMA(module, [0.9]), EMA(nn.Linear(2, 2), [0.9])
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.shadows[0.9]["weight"], module.weight)
    with pytest.raises(ArgumentError, match="names differ"):
        EMA(module, [0.5]).load_state_dict(ema.state_dict())
    with pytest.raises(ArgumentError, match="decays"):
        EMA(module, [1.0])
