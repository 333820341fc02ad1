"""A network that makes images: a student in one evaluation each or a few, or a teacher with its sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdistill.base.rng import indexed_normal
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.generation.maker import Evaluations, Told, finite_uint8
from fdistill.generator import Student
from fdistill.sampler import heun_sample
from fdistill.students.tiue import TiUEGenerator
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.teachers.text_encoders import EncodesPrompts, describe_cut


@dataclass(frozen=True)
class Source:
    """Something that makes images: a student, or a teacher with `num_steps` of Heun's method.

    Attributes:
        weights_sha256: hash of the network's weight files.
        latents: the autoencoder that makes images of the network's samples; None for a network of pixels.
        text: encoders of prompts; None for a network that is told none.
        guidance_scale: of a teacher; None for a student.
    """

    name: str
    model: Student | Denoiser
    num_steps: int | None
    weights_sha256: str
    latents: LatentSpace | None = None
    text: EncodesPrompts | None = None
    guidance_scale: float | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The network that is evaluated."""
        return self.model if isinstance(self.model, Denoiser) else self.model.denoiser

    @property
    def kind(self) -> str:
        """ "student" or "teacher"."""
        return "student" if self.num_steps is None else "teacher"

    @property
    def sampler(self) -> str | None:
        """Of a teacher; None for a student."""
        return None if self.num_steps is None else "heun"

    @property
    def takes_prompts(self) -> bool:
        """Whether prompts are what it is told."""
        return self.text is not None

    @property
    def num_classes(self) -> int | None:
        """Labels are in [0, num_classes); None if it is told none."""
        return self.model.num_classes

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """The text encoders, if there are any, are on the device inside the block, as `sample` wants them."""
        return nullcontext() if self.text is None else self.text.on(device)

    def cut(self, prompts: Sequence[str]) -> str:
        """One sentence on prompts that are too long for the text encoders; empty if there are none."""
        return "" if self.text is None else describe_cut(self.text.cut(prompts), prompts)

    @contextmanager
    def counted(self) -> Iterator[Evaluations]:
        """Counts the samples the network is evaluated on inside the block; the images are the caller's to count."""
        if isinstance(self.model, TiUEGenerator):  # which runs the parts of its network
            counted, steps = Evaluations(), len(self.model.levels)

            def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                counted.network += steps * len(arguments[0])

            hook = self.model.register_forward_pre_hook(count)
            try:
                yield counted
            finally:
                hook.remove()
        else:
            with counted_evaluations(self.denoiser) as counted:
                yield counted

    @torch.no_grad()
    def sample(self, seed: int, indices: Sequence[int], told: Told, device: torch.device) -> Tensor:
        """Images uint8 [N, C, H, W] on the CPU for N indices; each depends on (seed, index) and what is told of it.

        Raises:
            NonFiniteError: an image is not finite.
        """
        condition = self._condition(told, device)
        if isinstance(self.model, Denoiser):
            assert self.num_steps is not None
            noise = indexed_normal(seed, indices, self.model.sample_shape).to(device)
            x0 = heun_sample(self.model, noise, condition, self.num_steps)
        else:
            noise = indexed_normal(seed, indices, self.model.noise_shape()).to(device)
            x0 = self.model(noise, condition)
        return finite_uint8(x0 if self.latents is None else self.latents.decode(x0), indices, self.name)

    def _condition(self, told: Told, device: torch.device) -> Condition | None:
        if told is None or isinstance(told, Tensor):
            return None if told is None else told.to(device)
        assert self.text is not None
        return self.text.encode(told).to(device)


@contextmanager
def counted_evaluations(denoiser: Denoiser) -> Iterator[Evaluations]:
    """Counts the samples the network is evaluated on inside the block; the images are the caller's to count."""
    counted, run = Evaluations(), denoiser.run

    def counting(network_input: Tensor, *arguments: Any, **options: Any) -> Any:
        counted.network += len(network_input)
        return run(network_input, *arguments, **options)

    denoiser.run = counting  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        del denoiser.run
