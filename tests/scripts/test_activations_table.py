"""The table of activations: tensors without values count as real ones do, and the page has the script's numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import activations_table

from fdistill.config.reading import load_config
from fdistill.planning.fake_tensors import Live, as_on_a_gpu, fake

pytestmark = pytest.mark.thorough  # what is tried here takes a minute

ROOT = Path(__file__).parent.parent.parent


def counted(network: nn.Module, x: Tensor) -> Live:
    with Live([*network.parameters(), x]) as live:
        network(x).square().mean().backward()
    return live


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))


def test_what_is_there_and_what_was_at_the_peak() -> None:
    """Of 100 samples: a hidden layer before and after SiLU; then gradients of these and of the output beside them."""
    plain, x = network(), torch.randn(100, 8)
    live = counted(plain, x)
    gradients = sum(parameter.numel() for parameter in plain.parameters())
    assert live.now == 4 * gradients
    assert 4 * 100 * 2 * 16 <= live.peak <= 4 * 100 * (3 * 16 + 3 * 8) + 4 * gradients


def test_values_make_no_difference() -> None:
    real = counted(network(), torch.randn(100, 8))
    with fake():
        without = counted(network(), torch.randn(100, 8))
    assert (without.now, without.peak) == (real.now, real.peak)


def test_norms_are_wide_inside_autocast() -> None:
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(2, 4, 3, 3).bfloat16()
    with as_on_a_gpu():
        assert norm.bfloat16()(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == torch.float32


def test_a_network_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make, scheduler, millions = activations_table.NETWORKS["ddpm-cifar10"]
    monkeypatch.setitem(activations_table.NETWORKS, "ddpm-cifar10", (make, scheduler, millions + 1))
    with pytest.raises(ValueError, match=r"ddpm-cifar10: 35\.7 M parameters, published with 36\.7 M"):
        activations_table.published("ddpm-cifar10", load_config("ddpm-cifar10"))


def test_every_recipe_has_a_network() -> None:
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("digit")}
    assert recipes == activations_table.NETWORKS.keys()


def test_the_page_has_the_scripts_numbers() -> None:
    page = (ROOT / "docs" / "memory.md").read_text().splitlines()
    lines = activations_table.table(["ddpm-cifar10"]).splitlines()
    assert [line for line in lines if line not in page] == []
    for recipe in activations_table.NETWORKS:
        assert sum(line.startswith(f"| {recipe} | ") and line.count("|") == 7 for line in page) == 1
