"""How a run's networks are run faster: by the order of their memory, compiled blocks, and cores that are free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from fdistill.adapters.blocks import compile_blocks
from fdistill.base import rng
from fdistill.base.cores import shared_cores
from fdistill.base.errors import ConfigError
from fdistill.config.schema import DistillConfig

#: Whether torch is new enough: tests/training/test_speed.py fails with 2.8 (a group norm's weight in attention), and
#: 2.9 and 2.10 were not tried; 2.11, 2.14 and 2.15 pass.
COMPILES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


def check_speed(config: DistillConfig, processes: int) -> None:
    """Raises ConfigError where a setting of `speed` does not go with the others."""
    if config.speed.channels_last and (processes > 1 or config.offload_frozen or config.offload_optimizers):
        raise ConfigError(
            "speed.channels_last: got true with several processes or offloaded weights, which torch's FSDP2 holds in "
            "torch's own order only; expected false"
        )
    if config.speed.compile and not COMPILES:
        raise ConfigError(
            f"speed.compile: got true with torch {torch.__version__}, but with torch 2.8 compiled blocks got wrong "
            "gradients; expected false, or torch 2.11 or newer, with which they are right"
        )
    for stage in config.stage_configs():
        heads = stage.discriminator
        if config.speed.compile and heads.r1_weight and heads.r1 == "exact":
            raise ConfigError(
                "speed.compile: got true, but discriminator.r1=exact differentiates twice, which torch.compile cannot; "
                "expected false, or discriminator.r1=approximate"
            )


def quicken(config: DistillConfig, modules: Iterable[nn.Module | None]) -> None:
    """Applies the settings of `speed` to modules on their device, before they are sharded."""
    for module in modules:
        if module is None:
            continue
        if config.speed.channels_last:
            module.to(memory_format=torch.channels_last)
        if config.speed.compile:
            compile_blocks(module)


def follow_others(config: DistillConfig, device: torch.device) -> AbstractContextManager[Callable[[], None]]:
    """`shared_cores` with speed.share_cores, otherwise a function that does nothing.

    Several processes keep their threads: they are one another's other programs, and must round alike.
    """
    shares = config.speed.share_cores and rng.world()[1] == 1
    return shared_cores(device, compiled=config.speed.compile) if shares else nullcontext(lambda: None)
