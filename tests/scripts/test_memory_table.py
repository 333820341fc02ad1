"""The table of memory: what it counts is what runs hold, and what it says of LoRA mode is true."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdistill.adapters.checkpoint import load_denoiser
from fdistill.commands.smoke import smoke_config
from fdistill.config.reading import load_config
from fdistill.denoiser import Denoiser
from fdistill.guidance import GuidedDenoiser
from fdistill.training.build import build
from fdistill.training.distillation import Distillation
from support.extras import recipes

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import memory_table

ROOT = Path(__file__).parent.parent.parent

#: Parameters in millions, as papers and cards say, some of them rounded: FLUX.1-dev's card has 12 billion.
PUBLISHED = {"sd15": 860, "sdxl": 2570, "sd35-medium": 2240, "flux-dev": 11900, "pixart-sigma": 610, "z-image": 6150}
PUBLISHED |= {"qwen-image": 20430, "sana": 1605}
RECIPES = {name: name for name in PUBLISHED} | {
    f"{name}-lora-24gb": name for name in ("sd15", "sdxl", "sd35-medium", "flux-dev", "flux2-klein")
}


def test_adapters_of_rank_64_on_sd15_add_at_most_15_per_cent_of_the_base() -> None:
    beyond, base = memory_table.beyond_base("sd15", "fp32")
    # 16 transformer blocks with two attentions of four projections each; two of the eight see text, which is 768 wide.
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    parameters = sum(64 * (12 * width + 2 * (width + 768)) for width in widths)
    assert beyond == parameters * (16 + 20)  # weights, gradients, two moments; and an average for the student
    assert base == 4 * 859_520_964
    assert 0.1 < beyond / base <= 0.15
    # Of a base in bf16 the same bytes are twice the share, which is beyond the bound: the page says so.
    assert memory_table.beyond_base("sd15", "bf16") == (beyond, base // 2)


@pytest.mark.parametrize("network", recipes(PUBLISHED))
def test_networks_have_their_published_size(network: str) -> None:
    denoiser = memory_table.published(network)
    assert {parameter.device.type for parameter in denoiser.parameters()} == {"meta"}
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    assert parameters == pytest.approx(PUBLISHED[network] * 1e6, rel=0.005)


def test_a_network_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build_sd15, scheduler, millions = memory_table.NETWORKS["sd15"]
    monkeypatch.setitem(memory_table.NETWORKS, "sd15", (build_sd15, scheduler, millions + 1))
    with pytest.raises(ValueError, match=r"sd15: 859\.5 M parameters, published with 860\.5 M"):
        memory_table.published("sd15")


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address: what is shared counts once."""
    return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}


def held(run: Distillation) -> int:
    """Bytes of everything that a run of one update keeps, activations apart."""
    teacher = run.networks.teacher
    if isinstance(teacher, GuidedDenoiser):
        teacher = teacher.denoiser  # without the null prompt beside it
    modules: list[nn.Module] = [teacher, *map(run.role, run.optimizers)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for optimizer in run.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tensors += [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        states: list[dict[str, Any]] = list(optimizer.state.values())
        # Without counts of steps, and without the tables of 8 bits, which all parameters share.
        moments = [
            value for state in states for name, value in state.items() if "step" not in name and "qmap" not in name
        ]
        tensors += moments
    tensors += [value for shadow in run.ema.shadows.values() for value in shadow.values()]
    return sum(storages(tensors).values())


@pytest.mark.parametrize(
    "name", recipes(["sd15", "sdxl", "sd15-lora-24gb", "sdxl-lora-24gb", "flux-dev-lora-24gb", "pixart-sigma"])
)
def test_what_is_counted_is_what_a_run_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny network of a smoke run stands for the published one: counted, and built and updated."""
    config = smoke_config(name)
    run = build(config, torch.device("cpu"))

    def tiny(network: str, resolution: int | None = None) -> Denoiser:
        return load_denoiser(run.checkpoint).requires_grad_(False)

    monkeypatch.setattr(memory_table, "published", tiny)
    assert sum(row.total for row in memory_table.rows(name, config)) == held(run)


@pytest.mark.thorough
@pytest.mark.parametrize("name", recipes(RECIPES))
def test_a_recipes_head_says_what_it_takes(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    said = re.search(r"AdamW and EMA\s+(?:#\s+)?take (\d+(?:\.\d)?) GB", text)
    assert said is not None
    counted = sum(row.total for row in memory_table.rows(RECIPES[name], load_config(name))) / 1e9
    assert f"{counted:.{len(said[1].partition('.')[2])}f}" == said[1]


def test_the_page_has_the_bytes_of_weights_in_few_bits() -> None:
    page = (ROOT / "docs" / "memory.md").read_text()
    assert f"\n{memory_table.stored(['sd15'])}\n" in page


@pytest.mark.thorough
def test_the_page_has_the_scripts_numbers() -> None:
    page = (ROOT / "docs" / "memory.md").read_text().splitlines()
    networks = ["sd15", "sd35-medium"]
    tables = f"{memory_table.table(networks)}\n{memory_table.bound(networks)}".splitlines()
    assert [line for line in tables if line not in page] == []
    assert len(tables) == 2 + 20 + 2 + 4
    for network in memory_table.NETWORKS:
        rows = 10 if load_config(network).discriminator.gan_weight else 8  # with heads in both modes, or without
        found = sum(line.startswith(f"| {network} |") for line in page)
        assert found == rows + 2 + 1 + 1  # the last two are of few bits and of activations
