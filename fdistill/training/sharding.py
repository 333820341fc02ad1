"""Roles over several processes by torch's FSDP2 (`fully_shard`), whole or in shards; gradients are averaged while
backward still runs.

The setting `parallel` is a device mesh. "ddp" puts each process into a shard group of its own, so that every process
has whole weights and gradients alone are averaged. "fsdp" shards over all processes, "hybrid" over those of a machine,
with copies on the other machines. Weights, gradients, the optimiser's states and the averages are sharded alike; all
are float32. A block's weights are gathered when it runs, and freed after it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fdistill.adapters.blocks import blocks
from fdistill.base import rng
from fdistill.base.distributed import exchanging, part, sum_over_processes
from fdistill.base.errors import ConfigError
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.generator import FewStepGenerator, Student
from fdistill.students.lora import has_adapters

M = TypeVar("M", bound=nn.Module)

#: Parameters that a block must have: smaller ones are gathered with what they lie in, because a collective of their own
#: would take longer to start than to run.
SMALLEST_BLOCK = 100_000
_SHARDS = 1  # the mesh's second dimension


def make_mesh(parallel: str, device: torch.device, *, offload: bool) -> DeviceMesh | None:
    """The processes as (copies, shards); None for one process alone that offloads nothing.

    Raises:
        ConfigError: hybrid, and machines do not have the same number of processes.
    """
    processes = rng.world()[1]
    if processes == 1:
        if not offload:
            return None
        if not dist.is_initialized():  # FSDP2 offloads, and wants a group even of one
            store = dist.HashStore()  # type: ignore[attr-defined]
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if parallel == "hybrid" and processes % machine:
        raise ConfigError(
            f"parallel: hybrid shards within a machine, and {processes} processes are not the same number on each "
            f"(here {machine}); expected as many on every machine, or parallel=fsdp"
        )
    shards = {"ddp": 1, "hybrid": machine, "fsdp": processes}[parallel]
    with exchanging():
        return init_device_mesh(device.type, (processes // shards, shards), mesh_dim_names=("copies", "shards"))


def is_sharded(mesh: DeviceMesh | None) -> bool:
    """Whether a process holds parts of the weights only, so that every process must take part in every pass."""
    return mesh is not None and mesh.size(_SHARDS) > 1


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: str = "fp32",
    offload: bool = False,
    frozen: bool = True,
    narrow: bool = False,
) -> None:
    """Distributes a module's weights and gradients, in place.

    Args:
        module: a `Denoiser`, a `Student` or another module; activation checkpointing was applied before.
        mesh: from `make_mesh`.
        precision: "bf16" gathers the shards of blocks in bfloat16; what is reduced and kept is float32.
        offload: shards, gradients and the optimiser's states are in the CPU's memory.
        frozen: whether weights that are not trained are distributed too; otherwise they stay as they are.
        narrow: whether the shards become bfloat16, for a network that is not trained.
    """
    whole = not is_sharded(mesh)
    # FSDP2 takes no scalars, as EDM2's gains are; they stay whole, and `average_scalars` is for their gradients.
    left = {each for each in module.parameters() if not each.ndim or not (frozen or each.requires_grad)}
    for each in left:
        each.data = each.data.to(mesh.device_type)
    policy: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
        "ignored_params": left,
    }
    gathered = torch.bfloat16 if precision == "bf16" and not whole else None
    of_blocks = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for block in gathered_blocks(module):
        fully_shard(block, **policy, mp_policy=of_blocks)
    fully_shard(module, **policy, mp_policy=MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False))
    if mesh.device_type == "cpu":  # gloo's reduce_scatter of torch 2.8 adds up where it is asked for a mean
        for part_of_it in module.modules():
            if isinstance(part_of_it, FSDPModule):
                part_of_it.set_force_sum_reduction_for_comms(True)
    if narrow:
        module.to(torch.bfloat16)
    for name in _entrances(module):
        register_fsdp_forward_method(module, name)


def distributes_frozen(config: DistillConfig, mesh: DeviceMesh | None) -> bool:
    """Whether the weights that are not trained are distributed as well."""
    return is_sharded(mesh) or config.offload_frozen


def narrows_frozen(config: DistillConfig, mesh: DeviceMesh | None) -> bool:
    """Whether weights that are not trained become bfloat16 as shards: before, they are the memory of files."""
    return config.frozen_precision == "bf16" and distributes_frozen(config, mesh)


def distribute(
    config: DistillConfig,
    mesh: DeviceMesh,
    frozen: Denoiser,
    guide: Denoiser | None,
    fake_score: Denoiser,
    student: Student,
    discriminator: nn.Module | None,
) -> None:
    """Spreads the networks over processes, or over a GPU and the CPU's memory, as the config says."""
    share = distributes_frozen(config, mesh)
    for network in (frozen, guide):
        if network is not None and share:
            narrow = narrows_frozen(config, mesh)
            shard(network, mesh, precision=config.precision, offload=config.offload_frozen, narrow=narrow)
    for role in (student, fake_score, discriminator):
        if role is not None:
            adapters = has_adapters(role)
            offload = config.offload_optimizers or (config.offload_frozen and adapters)
            shard(role, mesh, precision=config.precision, offload=offload, frozen=share)
            if share and adapters:
                for adapted in role.denoisers if isinstance(role, Student) else (role,):
                    share_frozen(adapted, frozen)
                role._apply(lambda value: value)  # FSDP2 takes the new shards, and gives up those of before


def _entrances(module: nn.Module) -> tuple[str, ...]:
    """The methods beside `forward` through which a module is run."""
    if isinstance(module, FewStepGenerator):
        return ("last_step",)
    if isinstance(module, Student):
        return ("sample_with_predictions",)
    return ("run",) if isinstance(module, Denoiser) else ()


def gathered_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network whose weights are gathered by themselves."""
    return blocks(module, SMALLEST_BLOCK)


def aliased(module: M) -> M:
    """A copy whose weights are the same memory, for sharding, which copies each process's part of them alone."""
    memo = {
        # Scalars stay whole, and need memory of their own.
        id(each): nn.Parameter(each.detach() if each.ndim else each.detach().clone(), each.requires_grad)
        for each in module.parameters()
    }
    return copy.deepcopy(module, memo)


def share_frozen(module: nn.Module, frozen: nn.Module) -> None:
    """Lets sharded adapters use the shards of the network that they were added to, in place of shards of their own.

    Args:
        module: has the parameters of `frozen`, those of adapted layers under "<layer>.base_layer".
    """
    own = frozen.state_dict()
    state = module.state_dict()
    for name in state:
        plain = name.replace(".base_layer.", ".")
        if ".lora_" not in name and plain in own:
            state[name] = own[plain]
    module.load_state_dict(state, assign=True)


def total_norm(values: Iterable[Tensor]) -> Tensor:
    """The norm of all values of all processes' parts, 0-d, float32 or wider."""
    values = list(values)
    spread = [value for value in values if isinstance(value, DTensor) and value.device_mesh.size(_SHARDS) > 1]
    if not spread:
        return nn.utils.get_total_norm([part(value) for value in values])
    mesh = spread[0].device_mesh
    norm = nn.utils.get_total_norm([part(value) for value in spread])
    square = norm.square().to(mesh.device_type)
    with exchanging():
        dist.all_reduce(square, group=mesh.get_group(_SHARDS))
    whole = [value for value in values if not isinstance(value, DTensor)]
    if whole:
        square = square + nn.utils.get_total_norm(whole).square()
    return square.sqrt().to(norm.device)


def average_scalars(gradients: Iterable[Tensor]) -> None:
    """Averages the gradients of scalars over processes in one collective; the others are averaged already."""
    scalars = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if scalars and rng.world()[1] > 1:
        means = sum_over_processes(torch.stack(scalars)) / rng.world()[1]
        torch._foreach_copy_(scalars, list(means.unbind()))


def average_gradients_next(modules: Iterable[nn.Module], last: bool) -> None:
    """Says whether the next backward averages gradients over processes, as the last of an update must, or adds them up
    in each process.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU; an empty dict unless `keep`. Every process must call it."""
    found = {}
    for name, value in tensors.items():
        whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            found[name] = whole.detach().cpu()
    return found


def blank(module: M) -> M:
    """A copy without memory for weights, to be filled by `filled`."""
    memo = {id(each): nn.Parameter(each.detach().to("meta"), each.requires_grad) for each in module.parameters()}
    return copy.deepcopy(module, memo)


def filled(empty: M, tensors: Mapping[str, Tensor]) -> M:
    """A copy of what `blank` returned with a state dict as its weights."""
    module = copy.deepcopy(empty)
    module.load_state_dict(dict(tensors), assign=True)
    return module
