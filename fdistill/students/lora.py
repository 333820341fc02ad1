"""Copies of a frozen network that share its weights and add trainable low-rank adapters (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fdistill.adapters.quantised_layers import restore
from fdistill.base.errors import ConfigError
from fdistill.denoiser import Denoiser

#: Names of the adapters in peft.
STUDENT, FAKE = "student", "fake"


def lora_copy(
    denoiser: Denoiser,
    rank: int,
    *,
    adapter: str = FAKE,
    setting: str = "fake_score",
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
) -> Denoiser:
    """A copy of `denoiser` with trainable adapters; at first it computes the same function.

    The frozen weights are shared, not copied: student, fake score and teacher together take the memory of one network
    and its adapters, and no adapters have to be switched on or off between them.

    Args:
        denoiser: a frozen network; the copy is in the same train or eval mode.
        rank: rank of the adapters, which are float32 and start at zero.
        adapter: the adapters' name in peft.
        setting: name of the config section of these adapters, for messages.
        alpha: the adapters' output is scaled by alpha / rank; by default alpha is the rank.
        targets: ends of names; linear and convolutional layers whose names end in one of them get adapters. By default
            all such layers do.

    Raises:
        ConfigError: peft is not installed, the network has no layer for adapters, or no layer's name matches `targets`.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"{setting}.lora_rank: adapters need peft, which is not installed; run `pip install 'fdistill[lora]'`, or "
            f"set {setting}.lora_rank=0 to train all weights"
        )
    from peft import LoraConfig, inject_adapter_in_model

    shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    adapted: Denoiser = copy.deepcopy(denoiser, shared)
    layers = [name for name, module in adapted.named_modules() if _takes_adapters(module)]
    chosen = [name for name in layers if targets is None or any(_ends(name, target) for target in targets)]
    if not layers:
        raise ConfigError(
            f"{setting}.lora_rank: got {rank}, but this teacher has no torch.nn.Linear or Conv2d layer that adapters "
            "could be added to (EDM2 has layer classes of its own); expected 0"
        )
    if not chosen:
        raise ConfigError(
            f"{setting}.lora_targets: got {list(targets or [])}, but no layer's name ends in one of them; expected "
            f"ends of names, such as {layers[len(layers) // 2]}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=chosen)  # type: ignore[arg-type]
    inject_adapter_in_model(config, adapted, adapter_name=adapter)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft gives adapters the precision of the frozen weights
    return adapted


def round_adapters(denoiser: Denoiser) -> None:
    """Rounds new adapters to bf16, as those are from the start that `lora_copy` adds to a network in bf16."""
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()


def _takes_adapters(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def merged(denoiser: Denoiser) -> Denoiser:
    """A copy on the CPU in float32 with the adapters merged into the weights: W + alpha / rank B A.

    W is what the adapters were trained on; of a base in 8 or 4 bits it is what those bits say.
    """
    return _plain(denoiser, lambda layer: layer.merge())


def without_adapters(denoiser: Denoiser) -> Denoiser:
    """A copy on the CPU in float32 of what the adapters were added to."""
    return _plain(denoiser, lambda layer: None)


def _plain(denoiser: Denoiser, settle: Callable[[Any], None]) -> Denoiser:
    """A copy on the CPU in float32, in which each layer with adapters is its base layer after `settle`."""
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        # Tensors are copied to the CPU one by one: the device may have no memory for a second network.
        tensors = (*denoiser.parameters(), *denoiser.buffers())
        memo = {id(tensor): copy.deepcopy(tensor.cpu()) for tensor in tensors}
        plain = copy.deepcopy(denoiser, memo).to("cpu", torch.float32)
        restore(plain)
        for name, module in list(plain.named_modules()):
            if isinstance(module, LoraLayer):
                layer: Any = module
                settle(layer)
                parent, _, child = name.rpartition(".")
                setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    return plain


def has_adapters(denoiser: nn.Module) -> bool:
    """Whether a denoiser was made by `lora_copy`."""
    return any(hasattr(module, "lora_A") for module in denoiser.modules())
