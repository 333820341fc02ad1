"""Distributed modules in one process: a mesh of one, as offloading uses. tests/base/test_distributed.py has two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fdistill.adapters.checkpoint import load_denoiser, resolve_checkpoint
from fdistill.base.distributed import part
from fdistill.denoiser import Denoiser
from fdistill.students.lora import lora_copy
from fdistill.training import sharding
from fdistill.training.checkpoint import load_checkpoint, own_chunks, read_tensors, save_checkpoint
from fdistill.training.sharding import (
    aliased,
    blank,
    filled,
    gathered,
    gathered_blocks,
    shard,
    share_frozen,
    total_norm,
)
from support import families, text_families, text_families_dit, text_families_flux2
from support.thorough import at_night

MADE = {
    "UNet2DModel": families.consistency,
    "SongUNet": families.edm_ddpmpp,
    "DhariwalUNet": families.edm_adm,
    "EDM2": families.edm2,
    "DiT": families.dit,
    "sd15": text_families.sd15,
    "sdxl": text_families.sdxl,
    "sd3": text_families.sd3,
    "flux": text_families.flux_dev,
    "pixart": text_families_dit.pixart,
    "sana": text_families_dit.sana,
    "lumina2": text_families_dit.lumina2,
    **({"qwen-image": text_families_dit.qwen_image} if text_families_dit.HAS_QWEN_IMAGE else {}),
    **({"z-image": text_families_dit.z_image} if text_families_dit.HAS_Z_IMAGE else {}),
    **({"flux2": text_families_flux2.dev} if text_families_flux2.HAS_FLUX2 else {}),
}


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are distributed however small they are."""
    monkeypatch.setattr(sharding, "SMALLEST_BLOCK", 0)


def loaded(name: str, folder: Path) -> Denoiser:
    denoiser = load_denoiser(resolve_checkpoint(MADE[name](folder)))
    if name in ("flux", "qwen-image", "z-image", "flux2"):
        denoiser.resize(text_families.RESOLUTION, text_families.RESOLUTION)
    return denoiser.requires_grad_(True)


def passed(denoiser: Denoiser) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x0, a feature computed without the output, and the gradients of both by the weights' names."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *denoiser.sample_shape, generator=generator)
    t = torch.full((2,), (denoiser.schedule.t_min + denoiser.schedule.t_max) / 2)
    condition = denoiser.example_condition(2, "cpu")
    name = list(denoiser.feature_shapes)[-1]
    x0 = denoiser(x_t, t, condition)
    feature = denoiser.features(denoiser.network_input(x_t, t), t, condition, [name])[name]
    (x0.square().mean() + feature.square().mean()).backward()
    gradients = {name: part(p.grad) for name, p in denoiser.named_parameters() if p.grad is not None}
    return x0.detach(), feature.detach(), gradients


# tests/base/test_distributed.py and the tests below have others, whole and with adapters.
@pytest.mark.parametrize(
    "name", at_night(MADE, lambda name: name not in ("UNet2DModel", "EDM2", "sdxl", "flux", "sana"))
)
def test_a_sharded_network_computes_the_same(name: str, mesh: DeviceMesh, tmp_path: Path) -> None:
    plain = loaded(name, tmp_path)
    sharded = aliased(plain)
    shard(sharded, mesh)
    assert len(gathered_blocks(plain)) > 1
    assert all(isinstance(each, DTensor) for each in sharded.parameters() if each.ndim)
    expected, found = passed(plain), passed(sharded)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for key, gradient in expected[2].items():
        torch.testing.assert_close(found[2][key], gradient, rtol=1e-5, atol=1e-6)


def test_copies_for_sharding_take_no_memory(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Until they are sharded; then each has its own, so that training one leaves the others."""
    plain = loaded("UNet2DModel", tmp_path)
    copy = aliased(plain)
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in plain.parameters()]
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    shard(copy, mesh)
    with torch.no_grad():
        for parameter in copy.parameters():
            part(parameter).add_(1)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_adapters_use_the_shards_of_the_frozen_network(mesh: DeviceMesh, tmp_path: Path) -> None:
    frozen = loaded("DiT", tmp_path).requires_grad_(False)
    expected = frozen(torch.ones(1, *frozen.sample_shape), torch.ones(1) * 500, torch.zeros(1, dtype=torch.long))
    adapted = aliased(lora_copy(frozen, 2))
    shard(frozen, mesh)
    shard(adapted, mesh)
    share_frozen(adapted, frozen)
    own = {part(value).data_ptr() for value in frozen.parameters()}
    for name, value in adapted.named_parameters():
        assert (part(value).data_ptr() in own) == (".lora_" not in name), name
    found = adapted(torch.ones(1, *frozen.sample_shape), torch.ones(1) * 500, torch.zeros(1, dtype=torch.long))
    assert torch.equal(found, expected)


def test_an_empty_copy_is_filled_with_what_was_gathered(mesh: DeviceMesh, tmp_path: Path) -> None:
    plain = loaded("sd15", tmp_path)
    empty, expected = blank(plain), {name: value.clone() for name, value in plain.state_dict().items()}
    assert all(parameter.is_meta for parameter in empty.parameters())
    shard(plain, mesh)
    whole = filled(empty, gathered(plain.state_dict(), keep=True))
    assert type(whole) is type(empty)
    assert whole.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in whole.state_dict().items())
    assert gathered(plain.state_dict(), keep=False) == {}


def test_what_one_process_offloads_is_saved_and_read(mesh: DeviceMesh, tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    shard(module, mesh, offload=True)
    path = save_checkpoint(tmp_path, 1, own_chunks(module.state_dict()), {}, 1)
    whole, _ = load_checkpoint(path)
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in module.parameters():
            part(parameter).zero_()
    read_tensors(path, module.state_dict())
    torch.testing.assert_close(gathered(module.state_dict(), keep=True), expected, rtol=0, atol=0)


def test_the_norm_is_that_of_all_values() -> None:
    values = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0], [12.0, 0.0]])]
    assert total_norm(values) == 13
    assert total_norm([nn.Parameter(value) for value in values]) == 13


def test_small_blocks_are_gathered_with_what_they_lie_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = loaded("UNet2DModel", tmp_path)
    sizes = sorted(sum(value.numel() for value in block.parameters()) for block in gathered_blocks(network))
    monkeypatch.setattr(sharding, "SMALLEST_BLOCK", sizes[1] + 1)
    assert len(gathered_blocks(network)) == sum(size > sizes[1] for size in sizes) > 0


def test_shards_of_frozen_weights_become_bfloat16(mesh: DeviceMesh, tmp_path: Path) -> None:
    """As the whole network would, which is then never in memory."""
    plain = loaded("sd15", tmp_path).requires_grad_(False)
    sharded = aliased(plain)
    shard(sharded, mesh, narrow=True)
    plain.to(torch.bfloat16)
    for (name, one), two in zip(plain.state_dict().items(), sharded.state_dict().values(), strict=True):
        assert two.dtype == one.dtype, name
        assert torch.equal(part(two), one), name
    x_t, t = torch.randn(2, *plain.sample_shape), torch.full((2,), 500.0)
    condition = plain.example_condition(2, "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sharded(x_t, t, condition), plain(x_t, t, condition))
