"""What makes images: the protocol that networks and diffusers pipelines have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fdistill.base.errors import NonFiniteError
from fdistill.base.images import to_uint8

#: What N images should show: class labels int64 [N], N prompts, or None for an unconditional model.
LabelsOrPrompts = Tensor | Sequence[str] | None


@dataclass
class Evaluations:
    """Network evaluations, counted while images were made, and the number of these images."""

    network: int = 0
    images: int = 0

    @property
    def per_image(self) -> float:
        """Evaluations for one image (NFE)."""
        return self.network / max(1, self.images)


class Maker(Protocol):
    """A student, a teacher with its sampler, or a diffusers pipeline: whatever makes image i from (seed, i)."""

    @property
    def name(self) -> str:
        """The checkpoint, as the user gave it."""

    @property
    def kind(self) -> str:
        """ "student", "teacher" or "pipeline"."""

    @property
    def sampler(self) -> str | None:
        """What draws images, as "heun" or "LCMPipeline, LCMScheduler"; None for a student that fdistill runs itself."""

    @property
    def num_steps(self) -> int | None:
        """Sampler steps; None for a student that fdistill runs itself."""

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale; None if there is none to set, as for students."""

    @property
    def weights_sha256(self) -> str:
        """Hash of the weight files."""

    @property
    def takes_prompts(self) -> bool:
        """Whether images are made from prompts."""

    @property
    def num_classes(self) -> int | None:
        """Class labels are in [0, num_classes); None if it takes no labels."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """What is evaluated in sampling steps."""

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside the block everything that `sample` needs is on the device."""

    def cut(self, prompts: Sequence[str]) -> str:
        """One sentence on prompts that are too long and will be cut; empty if there are none."""

    def counted(self) -> AbstractContextManager[Evaluations]:
        """Counts network evaluations inside the block, one for each sample; the caller counts the images."""

    def sample(self, seed: int, indices: Sequence[int], condition: LabelsOrPrompts, device: torch.device) -> Tensor:
        """Images uint8 [N, C, H, W] on the CPU for N indices. Image i depends on (seed, i) and its condition alone.

        Args:
            condition: labels int64 [N] or N prompts, one for each index; None for an unconditional model.

        Raises:
            NonFiniteError: an image is not finite.
        """


def finite_uint8(x0: Tensor, indices: Sequence[int], name: str) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] as uint8 on the CPU, rounded to the nearest integer.

    Args:
        indices: the images' numbers, for the message.
        name: what made them, for the message.

    Raises:
        NonFiniteError: an image is not finite.
    """
    finite = torch.isfinite(x0).flatten(1).all(dim=1).tolist()
    if not all(finite):
        raise NonFiniteError(
            f"{name}: image {indices[finite.index(False)]} has values that are NaN or infinite; "
            "look at the checkpoint with `fdistill inspect`, and try a lower guidance scale"
        )
    return to_uint8(x0).cpu()


def describe_maker(maker: Maker) -> str:
    """One line about what was read of a checkpoint: "a student for 10 classes; hash of its weights 3f0c52..."."""
    classes = "no classes" if maker.num_classes is None else f"{maker.num_classes:,} classes"
    sampler = "" if maker.sampler is None else f", sampled by {maker.sampler} in {maker.num_steps} steps"
    takes = "prompts" if maker.takes_prompts else classes
    return f"a {maker.kind} for {takes}{sampler}; hash of its weights {maker.weights_sha256[:12]}"
