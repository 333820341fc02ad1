"""Trainable low-rank copies of a frozen network that share its weights (LoRA, arXiv 2106.09685), by peft."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fdistill.base.errors import ConfigError
from fdistill.denoiser import Denoiser

#: Names of the adapters, as a LoRA file and peft call them.
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
    """The same function as `denoiser`, with trainable adapters.

    The frozen weights are shared, not copied: student, fake score and teacher are three networks in the memory of one
    and its adapters, and nothing has to be switched between them.

    Args:
        denoiser: a frozen network; the copy is in the same train or eval mode.
        rank: of the adapters, float32, which start at zero.
        adapter: their name.
        setting: what the config calls these adapters, for messages.
        alpha: adapters count alpha / rank; the rank by default.
        targets: ends of the names of linear and convolutional layers; all of them by default.

    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
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
            f"{setting}.lora_rank: got {rank}, but this teacher has no linear or convolutional layer of torch's for "
            "adapters (EDM2 has its own); expected 0"
        )
    if not chosen:
        raise ConfigError(
            f"{setting}.lora_targets: got {list(targets or [])}, but no layer's name ends so; expected ends of names "
            f"such as {layers[len(layers) // 2]}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=chosen)  # type: ignore[arg-type]
    inject_adapter_in_model(config, adapted, adapter_name=adapter)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft gives adapters the precision of the frozen weights
    return adapted


def _takes_adapters(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def merged(denoiser: Denoiser) -> Denoiser:
    """A copy on the CPU in float32 with its adapters merged into the weights: W + alpha / rank B A."""
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        # Copied to the CPU one by one: the whole network may not fit a second time where it is.
        tensors = (*denoiser.parameters(), *denoiser.buffers())
        memo = {id(tensor): copy.deepcopy(tensor.cpu()) for tensor in tensors}
        plain = copy.deepcopy(denoiser, memo).to("cpu", torch.float32)
        for name, module in list(plain.named_modules()):
            if isinstance(module, LoraLayer):
                layer: Any = module
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    return plain


def has_adapters(denoiser: nn.Module) -> bool:
    """Whether a denoiser was made by `lora_copy`."""
    return any(hasattr(module, "lora_A") for module in denoiser.modules())
