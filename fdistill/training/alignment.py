"""Implicit distribution alignment (SenseFlow, arXiv 2506.00523): the fake score is pulled to the student.

After each of the student's updates the fake score's weights become (1 - a) fake + a student. A critic that lags behind
a fast student makes distribution matching diverge, as it does on large flow models; the pull keeps it near.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fdistill.base.distributed import part
from fdistill.base.errors import ConfigError
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.step import Networks


def check_alignment(config: DistillConfig, networks: Networks) -> None:
    """Checks that the student's weights mean the same in the fake score.

    Raises:
        ConfigError: fake_score.alignment is above 0, and the two have other weights or are adapters, whose product of
            averages is not the average of their products.
    """
    alignment = config.fake_score.alignment
    if not alignment:
        return
    if config.student.lora_rank or config.fake_score.lora_rank:
        raise ConfigError(
            f"fake_score.alignment: got {alignment:g}, but adapters cannot be averaged like weights; expected 0, or "
            "student.lora_rank and fake_score.lora_rank 0"
        )
    shapes = [
        {name: value.shape for name, value in module.named_parameters()}
        for module in (networks.fake_score, _student(networks))
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"fake_score.alignment: got {alignment:g}, but the student's network has other weights than the fake "
            "score's; expected 0, or a student with the teacher's network"
        )


@torch.no_grad()
def align(networks: Networks, alignment: float) -> None:
    """Pulls the fake score's weights to the student's; `alignment` in [0, 1] is the student's share."""
    if not alignment:
        return
    fake, student = (dict(module.named_parameters()) for module in (networks.fake_score, _student(networks)))
    torch._foreach_lerp_(
        [part(value.detach()) for value in fake.values()],
        [part(student[name].detach()) for name in fake],
        alignment,
    )
    for module in networks.fake_score.modules():
        if isinstance(module, Denoiser):
            module.after_update()


def _student(networks: Networks) -> nn.Module:
    student: Any = networks.generator
    denoiser: nn.Module = student.denoiser
    return denoiser
