"""Images from a network: from a student in one evaluation or a few, from a teacher with its sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError
from fdistill.base.rng import indexed_normal
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.generation.maker import Evaluations, LabelsOrPrompts, finite_uint8
from fdistill.generator import Student
from fdistill.guidance import GuidedDenoiser
from fdistill.sampler import heun_sample
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.teachers.text_encoders import EncodesPrompts, describe_cut


@dataclass(frozen=True)
class NetworkMaker:
    """A `Maker` that runs a network: a student, or a teacher with `num_steps` steps of Heun's method.

    Attributes:
        name: the checkpoint, as the user gave it.
        model: a teacher's denoiser, already guided, or a student.
        num_steps: steps of a teacher; None for a student.
        weights_sha256: hash of the network's weight files; of a guided teacher also of the network it is guided by.
        latents: decodes the network's samples to images; None for a network that works on pixels.
        text: encodes prompts; None for a network without prompts.
        guidance_scale: the scale that `model` is guided with, for the record; None for a student.
        pixels: height and width of images of another size than the network's own.
    """

    name: str
    model: Student | Denoiser
    num_steps: int | None
    weights_sha256: str
    latents: LatentSpace | None = None
    text: EncodesPrompts | None = None
    guidance_scale: float | None = None
    pixels: tuple[int, int] | None = None

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
        """ "heun" for a teacher; None for a student."""
        return None if self.num_steps is None else "heun"

    @property
    def takes_prompts(self) -> bool:
        """Whether images are made from prompts."""
        return self.text is not None

    @property
    def num_classes(self) -> int | None:
        """Class labels are in [0, num_classes); None if it takes no labels."""
        return self.model.num_classes

    @property
    def networks(self) -> Sequence[nn.Module]:
        """What is evaluated in sampling steps."""
        return [self.model]

    def at_size(self, height: int, width: int) -> NetworkMaker:
        """The same for images of so many pixels; sets the size of the network.

        Raises:
            ArgumentError: the network makes images of its own size alone, or none of this one.
        """
        if self.text is None or self.latents is None:
            raise ArgumentError(
                f"size: {self.name} makes images of one size; leave it out, or use a text-to-image model"
            )
        factor = self.latents.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ArgumentError(f"size: got {width}x{height}; expected multiples of {factor}, the autoencoder's factor")
        self.model.resize(height // factor, width // factor)
        return replace(self, pixels=(height, width))

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside the block the text encoders, if there are any, are on the device, as `sample` expects them."""
        return nullcontext() if self.text is None else self.text.on(device)

    def cut(self, prompts: Sequence[str]) -> str:
        """One sentence on prompts that are too long for the text encoders and will be cut; empty if there are none."""
        return "" if self.text is None else describe_cut(self.text.cut(prompts), prompts)

    @contextmanager
    def counted(self) -> Iterator[Evaluations]:
        """Counts network evaluations inside the block, one for each sample; the caller counts the images."""
        if isinstance(self.model, Denoiser):
            with counted_evaluations(self.model) as counted:
                yield counted
            return
        counted, each = Evaluations(), len(self.model.levels)

        def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            counted.network += each * len(arguments[0])

        hook = self.model.register_forward_pre_hook(count)
        try:
            yield counted
        finally:
            hook.remove()

    @torch.no_grad()
    def sample(self, seed: int, indices: Sequence[int], condition: LabelsOrPrompts, device: torch.device) -> Tensor:
        """As `Maker.sample`."""
        encoded = self._encoded(condition, device)
        if isinstance(self.model, Denoiser):
            assert self.num_steps is not None
            noise = indexed_normal(seed, indices, self.model.sample_shape).to(device)
            x0 = heun_sample(self.model, noise, encoded, self.num_steps)
        else:
            noise = indexed_normal(seed, indices, self.model.noise_shape()).to(device)
            x0 = self.model(noise, encoded)
        return finite_uint8(x0 if self.latents is None else self.latents.decode(x0), indices, self.name)

    def _encoded(self, condition: LabelsOrPrompts, device: torch.device) -> Condition | None:
        if condition is None or isinstance(condition, Tensor):
            return None if condition is None else condition.to(device)
        assert self.text is not None
        encoded = self.text.encode(condition)
        return (encoded if self.pixels is None else encoded.at_size(*self.pixels)).to(device)


@contextmanager
def counted_evaluations(denoiser: Denoiser) -> Iterator[Evaluations]:
    """Counts evaluations of the denoiser, and of a network it is guided by, inside the block, one for each sample; the
    caller counts the images.
    """
    counted = Evaluations()
    guide = denoiser.guide if isinstance(denoiser, GuidedDenoiser) else None
    networks = [denoiser] if guide is None else [denoiser, guide]
    for network in networks:
        network.run = partial(_counting, counted, network.run)  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        for network in networks:
            del network.run


def _counting(
    counted: Evaluations, run: Callable[..., Any], network_input: Tensor, *arguments: Any, **options: Any
) -> Any:
    counted.network += len(network_input)
    return run(network_input, *arguments, **options)
