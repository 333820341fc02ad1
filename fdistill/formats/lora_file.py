"""LoRA files: a student's adapters under diffusers' names and under kohya's, and the spellings that others use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import atomic_file, not_weights
from fdistill.formats.peft_config import check_settings, lora_files, read_peft_config
from fdistill.formats.pipeline_folder import unreadable

#: As `load_lora_weights` of diffusers' pipelines looks for it in a folder.
LORA_FILE = "pytorch_lora_weights.safetensors"

_PEFT = "base_model.model."
_TENSOR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<matrix>A|B|down|up)(?:\.default)?|[._]lora\.(?P<processor>down|up)|"
    r"\.lora_linear_layer\.(?P<text>down|up))\.weight"
)


def lora_tensors(network: nn.Module, adapter: str = "student") -> dict[str, Tensor]:
    """ "<path of layer>.lora_A.weight" [rank, in, ...] and ".lora_B.weight" [out, rank, ...] of peft's adapter.

    The adapter's scale (alpha / rank) is in lora_B, so that every reader takes the file for one of scale 1.

    Raises:
        ArgumentError: the network has no adapter of this name.
    """
    from peft.tuners.lora import LoraLayer

    made: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            layer: Any = module
            down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
            made[f"{name}.lora_A.weight"] = down.cpu().contiguous()
            made[f"{name}.lora_B.weight"] = (layer.scaling[adapter] * up).cpu().contiguous()
    if not made:
        raise ArgumentError(f"network: has no LoRA adapter called {adapter!r}")
    return made


def save_lora(network: nn.Module, path: Path, prefix: str, adapter: str = "student") -> None:
    """Writes what `pipeline.load_lora_weights(path.parent)` of diffusers reads.

    Args:
        network: a network of diffusers with peft's layers in it.
        path: to write; `LORA_FILE` is the name that diffusers looks for.
        prefix: the network's name in its pipeline, such as "unet".
        adapter: which of the network's adapters.

    Raises:
        ArgumentError: the network has no adapter of this name.
        OutputError: the file cannot be written.
    """
    tensors = {f"{prefix}.{name}": value for name, value in lora_tensors(network, adapter).items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def kohya_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's LoRA in diffusers' naming under the names that kohya's scripts write and ComfyUI reads.

    Raises:
        CheckpointError: a tensor of another network or naming.
    """
    made: dict[str, Tensor] = {}
    for name, value in tensors.items():
        path, _, matrix = name.removeprefix("unet.").rpartition(".lora_")
        if not name.startswith("unet.") or matrix not in ("A.weight", "B.weight"):
            raise CheckpointError(f"LoRA tensor {name!r}: expected unet.<layer>.lora_A.weight or .lora_B.weight")
        layer = f"lora_unet_{path.replace('.', '_')}"
        if matrix == "A.weight":
            made[f"{layer}.lora_down.weight"] = value
            made[f"{layer}.alpha"] = torch.tensor(float(len(value)))
        else:
            made[f"{layer}.lora_up.weight"] = value
    return made


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update: `scale` times up [out, rank, ...] times down [rank, in, ...]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """[out, in * ...] float32."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


def read_lora(path: Path) -> dict[str, LoraLayer]:
    """The layers of a LoRA by their names in its file, which are diffusers', peft's, kohya's or the publisher's.

    Args:
        path: the file, or a folder that peft or diffusers saved.

    Raises:
        CheckpointError: the file is unreadable, or holds more than plain low-rank updates (DoRA, LoHa, LoKr, biases).
    """
    path, *beside = lora_files(path)
    if path.suffix != ".safetensors":
        what = not_weights(path) or "expected a .safetensors file; convert a pickled LoRA with safetensors first"
        raise CheckpointError(f"{path}: {what}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    matrices: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match:
            kind = match["matrix"] or match["processor"] or match["text"]
            matrices.setdefault(_layer(match["layer"]), {})["down" if kind in ("A", "down") else "up"] = value
        elif name.endswith(".alpha") and value.numel() == 1:
            alphas[_layer(name.removesuffix(".alpha"))] = float(value)
        else:
            raise CheckpointError(
                f"{path}: tensor {name!r} is not of a plain LoRA; expected lora_A / lora_B, lora_down / lora_up and "
                "alpha (DoRA, LoHa, LoKr and whole checkpoints cannot be merged: fuse them elsewhere)"
            )
    written: Mapping[str, object] = _written_settings(path, metadata)
    if beside:
        written = {f".{key}": value for key, value in read_peft_config(beside[0]).items()}
    layers = {}
    for name, pair in matrices.items():
        if pair.keys() != {"down", "up"} or pair["down"].shape[0] != pair["up"].shape[1]:
            shapes = {kind: tuple(value.shape) for kind, value in pair.items()}
            raise CheckpointError(f"{path}: layer {name!r} has {shapes}; expected down [rank, in] and up [out, rank]")
        rank = len(pair["down"])
        layers[name] = LoraLayer(pair["down"], pair["up"], _scale(name, rank, alphas, written))
    if not layers:
        raise CheckpointError(f"{path}: holds no LoRA layers")
    return layers


def _layer(name: str) -> str:
    """A layer's name without what peft and torch.compile put before it, and without the attention processors that
    diffusers' first LoRA files put into it.
    """
    name = name.replace("_orig_mod.", "").removeprefix(_PEFT)
    if ".processor." in name:
        name = name.replace(".processor.", ".")
        name = f"{name}.0" if name.endswith(".to_out") else name
    return name


def _written_settings(path: Path, metadata: Mapping[str, str]) -> Mapping[str, object]:
    """peft's settings as diffusers writes them beside the tensors, "<component>.<setting>"."""
    try:
        written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: its lora_adapter_metadata is no JSON ({error})") from error
    if not isinstance(written, dict):
        raise CheckpointError(f"{path}: its lora_adapter_metadata is no JSON object")
    settings: dict[str, dict[str, object]] = {}
    for name, value in written.items():
        component, _, setting = name.rpartition(".")
        settings.setdefault(component, {})[setting] = value
    for component, own in settings.items():
        check_settings(f"{path}: {component}", own)
    return written


def _scale(name: str, rank: int, alphas: Mapping[str, float], written: Mapping[str, object]) -> float:
    """alpha / rank: alpha from the file, else from peft's settings, else the rank itself.

    Args:
        written: "<component>.<setting>" -> its value; without a component, what holds for all layers.
    """
    if name in alphas:
        return alphas[name] / rank
    component, _, path = name.partition(".")
    if ".lora_alpha" in written:
        component, path = "", name
    alpha = written.get(f"{component}.lora_alpha", rank)
    patterns = written.get(f"{component}.alpha_pattern") or {}
    assert isinstance(patterns, dict)
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):  # as peft matches its patterns
            alpha = value
            break
    assert isinstance(alpha, (int, float))
    return float(alpha) / (rank**0.5 if written.get(f"{component}.use_rslora") else rank)
