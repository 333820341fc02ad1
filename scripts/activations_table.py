"""Memory of one real iteration of every recipe at its peak, from updates on fake tensors, as Markdown.

python scripts/activations_table.py [RECIPE ...] [--out FILE]

Networks of the published sizes take part as a run builds them, with the recipe's own config, except that their tensors
have no values (torch's FakeTensorMode). A critic's and a student's update run forward and backward as in training, and
whatever tensor is made is counted from its first use to its last. Norms give float32 inside autocast, as on a GPU. What
is not seen: workspaces of convolutions, and what the allocator keeps in reserve.
"""

from __future__ import annotations

import argparse
import importlib.util
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import memory_table
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdistill.adapters import wrap
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.quantised_layers import numbers
from fdistill.base.devices import autocast
from fdistill.base.files import atomic_file
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.networks import EDM2Network, EDMNetwork
from fdistill.noise import noise_to_signal_range
from fdistill.step import StepResult
from fdistill.teachers.teacher import Teacher
from fdistill.training import build as building
from fdistill.training.checks import read_divergence
from fdistill.training.distillation import Distillation

CPU = torch.device("cpu")


def _edm_cifar10(classes: int) -> Callable[[], Any]:
    def made() -> Any:
        return EDMNetwork(
            model_type="SongUNet",
            img_resolution=32,
            label_dim=classes,
            augment_dim=9,
            model_channels=128,
            channel_mult=[2, 2, 2],
            num_blocks=4,
            attn_resolutions=[16],
        )

    return made


def _adm_imagenet64() -> Any:
    return EDMNetwork(
        model_type="DhariwalUNet",
        img_resolution=64,
        label_dim=1000,
        model_channels=192,
        channel_mult=[1, 2, 3, 4],
        num_blocks=3,
        attn_resolutions=[32, 16, 8],
    )


def _edm2_s() -> Any:
    return EDM2Network(
        img_resolution=64,
        img_channels=4,
        label_dim=1000,
        latent_scale=[0.1] * 4,
        latent_bias=[0.0] * 4,
    )


def _ddpm_cifar10() -> Any:
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
    )


def _dit_xl_2() -> Any:
    return DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=28)


def _sd21() -> Any:
    return UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    )


_SD21 = {**memory_table._BETAS, "prediction_type": "v_prediction"}
#: Recipe -> (its network, the scheduler beside it or None, its size in millions, without what is cut off on loading).
NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any] | None, float]] = {
    "cifar10-cond": (_edm_cifar10(10), None, 55.7),
    "cifar10-uncond": (_edm_cifar10(0), None, 55.7),
    "ddpm-cifar10": (_ddpm_cifar10, memory_table._LINEAR, 35.7),
    "imagenet64": (_adm_imagenet64, None, 295.9),
    "imagenet256": (_dit_xl_2, memory_table._LINEAR, 749.8),
    "imagenet512": (_edm2_s, None, 280.2),
    "sd21-v": (_sd21, _SD21, 865.9),
    **{f"{name}-lora-24gb": memory_table.NETWORKS[name] for name in ("sd15", "sdxl", "sd35-medium", "flux-dev")},
    **memory_table.NETWORKS,
}


def _alone(recipe: str) -> bool:
    """Whether a recipe is for one GPU; all others are for eight."""
    return recipe == "ddpm-cifar10" or recipe.endswith("-24gb")


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make inside the block, from their making to their end.

    Attributes:
        now: bytes of those that are there.
        peak: the most that there were.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._add(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value, value.untyped_storage().nbytes())
        return result

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def ended() -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage)
        weakref.finalize(storage, ended)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside autocast norms take and give float32: the CPU's list of such functions lacks them."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else value

    def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            return function(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})

        return called

    norms: dict[str, Any] = {name: widened(getattr(nn.functional, name)) for name in ("group_norm", "layer_norm")}
    with mock.patch.multiple(nn.functional, **norms):
        yield


@contextmanager
def fake() -> Iterator[None]:
    """Inside, tensors have no values, and can be copied and converted all the same."""

    def copied(tensor: Any, memo: dict[int, Any]) -> Any:
        if not isinstance(tensor, FakeTensor):
            return tensor  # of a schedule, which has values
        if id(tensor) not in memo:
            value = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
            memo[id(tensor)] = value
        return memo[id(tensor)]

    copies = mock.patch.object(Tensor, "__deepcopy__", copied)
    moves = mock.patch.object(nn.Module, "_apply", _applied)
    with FakeTensorMode(allow_non_fake_inputs=True), copies, moves:
        yield


def _applied(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which cannot change tensors without values in place."""
    for child in module.children():
        _applied(child, function)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (value := function(parameter)).dtype != parameter.dtype:
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and (value := function(buffer)).dtype != buffer.dtype:
                module._buffers[name] = value
    return module


def published(recipe: str, config: DistillConfig) -> Denoiser:
    """The recipe's teacher on fake tensors, frozen, float32, for the recipe's resolution.

    Raises:
        ValueError: it has another number of parameters than was published.
    """
    make, scheduler, millions = NETWORKS[recipe][:3]
    with fake():
        network = make().eval()
    denoiser = wrap(network, scheduler).requires_grad_(False)
    if config.resolution is not None:
        denoiser.resize(config.resolution // 8)
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    if abs(size - millions) > 0.2:
        raise ValueError(f"{recipe}: {size:.1f} M parameters, published with {millions} M")
    return denoiser


def built(recipe: str, config: DistillConfig) -> Distillation:
    """The run that the recipe describes, on fake tensors."""
    teacher = published(recipe, config)
    noise_to_signal_range(teacher.schedule)  # what is computed once from values: this, the divergence, and numbers
    if config.frozen_precision in ("int8", "fp8"):
        numbers(config.frozen_precision, CPU)
    divergences = [read_divergence(stage) for stage in config.stage_configs()]
    null: Any = None
    if teacher.text_shapes is not None:
        null = SimpleNamespace(embeddings=SimpleNamespace(null=teacher.example_condition(1, CPU)))
    loaded = building._Loaded(Teacher(Checkpoint(recipe), teacher, None), None, None, null)
    # The check of the student's export computes with values; every run of the recipe passes it. So do the tables of
    # 8-bit AdamW, which takes no step here.
    with fake(), mock.patch("fdistill.students.kinds.check_exportable"), _no_steps():
        return building._assemble(config, CPU, divergences, loaded)


def _no_steps() -> AbstractContextManager[Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return nullcontext()
    return mock.patch("bitsandbytes.optim.optimizer.Optimizer8bit.fill_qmap")


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class Peak:
    """Bytes on one GPU.

    Attributes:
        batch: samples on this GPU.
        held: weights, optimiser and averages, all the time.
        critic, student: the most that an update has on top: activations, what is made in between, and gradients.
    """

    recipe: str
    batch: int
    held: int
    critic: int
    student: int

    @property
    def total(self) -> int:
        return self.held + max(self.critic, self.student)


def peak(recipe: str, **changes: Any) -> Peak:
    """One update of the critic and one of the student, as in training; `changes` are settings of the config."""
    config = load_config(recipe, changes)
    batch = config.batch_size // (1 if _alone(recipe) else 8)
    run = built(recipe, config)
    run.iteration = run.stages[-1].first  # a warm-up by regression before it needs less
    teacher = run.networks.teacher
    modules = [teacher, *(run.role(name) for name in run.optimizers)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    averages = [value for shadow in run.ema.shadows.values() for value in shadow.values()]
    moments = sum(
        memory_table.moments((p for p in run.role(role).parameters() if p.requires_grad), config.roles[role].optimizer)
        for role in run.optimizers
    )
    held = _bytes([*tensors, *averages]) + moments
    with fake(), as_on_a_gpu():
        condition = teacher.example_condition(batch, CPU)
        real = torch.zeros(batch, *teacher.sample_shape)
        known = [*tensors, *averages, real]
        given = {"condition": condition, "generator": torch.Generator()}
        critic = _updated(run, known, run.critic_update, {**given, "real_x0": real})
        student = _updated(run, known, run.student_update, {**given, "batch_size": batch})
    return Peak(recipe, batch, held, critic, student)


def _updated(
    run: Distillation, known: list[Tensor], update: Callable[..., StepResult], arguments: dict[str, Any]
) -> int:
    """Bytes at the peak of an update, forward and backward; the gradients are gone afterwards."""
    with Live(known) as live:
        with autocast(CPU, run.config.precision):
            result = update(**arguments)
        result.loss.backward()
    for name in run.optimizers:
        for parameter in run.role(name).parameters():
            parameter.grad = None
    most: int = live.peak
    return most


def table(recipes: Iterable[str] = NETWORKS) -> str:
    """A line for each recipe, in GB (1e9 bytes)."""
    lines = [
        "| recipe | samples per GPU | weights, AdamW, EMA | critic's update | student's update | peak, GB |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        found = peak(recipe)
        parts = (found.held, found.critic, found.student, found.total)
        lines.append(f"| {recipe} | {found.batch} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="all by default")
    parser.add_argument("--out", type=Path, help="a file for the table")
    arguments = parser.parse_args()
    text = table(arguments.recipes or sorted(NETWORKS)) + "\n"
    if arguments.out is not None:
        with atomic_file(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
