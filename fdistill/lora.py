"""A trainable low-rank copy of a frozen network that shares its weights (LoRA, arXiv 2106.09685), by peft."""

from __future__ import annotations

import copy
import importlib.util

from torch import nn

from fdistill.denoiser import Denoiser
from fdistill.errors import ConfigError


def lora_copy(denoiser: Denoiser, rank: int) -> Denoiser:
    """The same function as `denoiser`, with trainable adapters on all its linear and convolutional layers.

    The frozen weights are shared, not copied: two networks in the memory of one and its adapters.

    Args:
        denoiser: a frozen network; the copy is in the same train or eval mode.
        rank: of the adapters, which start at zero.

    Raises:
        ConfigError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "fake_score.lora_rank: adapters need peft, which is not installed; run `pip install 'fdistill[lora]'`, or "
            "set fake_score.lora_rank=0 to train all weights"
        )
    from peft import LoraConfig, inject_adapter_in_model

    shared = {id(parameter): parameter for parameter in denoiser.parameters()}
    adapted: Denoiser = copy.deepcopy(denoiser, shared)
    targets = [name for name, module in adapted.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not targets:
        raise ConfigError(
            f"fake_score.lora_rank: got {rank}, but this teacher has no linear or convolutional layer of torch's for "
            "adapters (EDM2 has its own); expected 0"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapted)
    return adapted
