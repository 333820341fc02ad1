"""Images from a student in one evaluation each or a few, or from a teacher with its sampler; in memory or as PNG."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fdistill import __version__
from fdistill.adapters import Checkpoint
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.devices import start
from fdistill.errors import ArgumentError
from fdistill.files import atomic_folder, claim_folder, partial_path, weights_sha256, writing
from fdistill.generator import Generator, noise_shape
from fdistill.guidance import GuidedDenoiser
from fdistill.images import to_uint8
from fdistill.latents import LatentSpace, attach_latent_space
from fdistill.pipeline import is_student, load_student
from fdistill.report import to_pil
from fdistill.rng import indexed_normal
from fdistill.sampler import heun_sample
from fdistill.teacher import open_teacher
from fdistill.text import PromptEncoder, describe_cut, open_prompt_encoder
from fdistill.tiue import TiUEGenerator

#: What images are asked to be: labels int64 [N], N prompts, or nothing.
Told = Tensor | Sequence[str] | None


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
    model: Generator | TiUEGenerator | Denoiser
    num_steps: int | None
    weights_sha256: str
    latents: LatentSpace | None = None
    text: PromptEncoder | None = None
    guidance_scale: float | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The network that is evaluated."""
        return self.model if isinstance(self.model, Denoiser) else self.model.denoiser

    @torch.no_grad()
    def sample(self, seed: int, indices: Sequence[int], told: Told, device: torch.device) -> Tensor:
        """Images uint8 [N, C, H, W] on the CPU for N indices; each depends on (seed, index) and what is told of it."""
        condition = self._condition(told, device)
        if isinstance(self.model, Denoiser):
            assert self.num_steps is not None
            noise = indexed_normal(seed, indices, self.model.sample_shape).to(device)
            x0 = heun_sample(self.model, noise, condition, self.num_steps)
        else:
            noise = indexed_normal(seed, indices, noise_shape(self.model)).to(device)
            x0 = self.model(noise, condition)
        return to_uint8(x0 if self.latents is None else self.latents.decode(x0)).cpu()

    def _condition(self, told: Told, device: torch.device) -> Condition | None:
        if told is None or isinstance(told, Tensor):
            return None if told is None else told.to(device)
        assert self.text is not None
        return self.text.encode(told).to(device)


@dataclass
class Evaluations:
    """Network evaluations, and the images they were spent on, as counted while it ran."""

    network: int = 0
    images: int = 0

    @property
    def per_image(self) -> float:
        return self.network / max(1, self.images)


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


def open_source(
    checkpoint: str | Path,
    device: torch.device,
    *,
    num_steps: int = 18,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    resolution: int | None = None,
    network: str | None = None,
) -> Source:
    """A student folder (or a run that has one), or any teacher that `load_teacher` takes.

    Args:
        num_steps, guidance_scale: of a teacher.
        negative_prompt, resolution: of a text-to-image teacher.
        network: "module:function" of a student of a user's own network.

    Raises:
        CheckpointError: neither.
    """
    path = Path(checkpoint)
    for folder in (path, path / "student"):
        if is_student(folder):
            student = load_student(folder, device, network=network)
            found = Checkpoint(str(checkpoint), folder)
            latents = attach_latent_space(student.denoiser, found, None)
            text = _prompt_encoder(found, student.denoiser, latents)
            return Source(str(checkpoint), student, None, weights_sha256(folder), latents, text)
    if num_steps < 1:
        raise ArgumentError(f"steps: expected at least 1, got {num_steps}")
    teacher = open_teacher(checkpoint, resolution=resolution)
    origin, denoiser, latents = teacher.checkpoint, teacher.denoiser.to(device), teacher.latents
    text = _prompt_encoder(origin, denoiser, latents)
    sha256 = weights_sha256(origin.folder) if origin.folder else origin.fingerprint(denoiser)
    if denoiser.embedded_guidance is not None:
        denoiser.embedded_guidance = guidance_scale
    elif guidance_scale != 1:
        null = None
        if text is not None:
            with text.on(device):
                null = text.null(negative_prompt)
        denoiser = GuidedDenoiser(denoiser, guidance_scale, null=null)
    return Source(str(checkpoint), denoiser, num_steps, sha256, latents, text, guidance_scale)


def _prompt_encoder(checkpoint: Checkpoint, denoiser: Denoiser, latents: LatentSpace | None) -> PromptEncoder | None:
    if denoiser.text_shapes is None:
        return None
    return open_prompt_encoder(checkpoint, denoiser.sample_shape[-1] * (1 if latents is None else latents.factor))


def told_of(
    source: Source, count: int, class_labels: Sequence[int] | None = None, prompts: Sequence[str] | None = None
) -> Told:
    """What `count` images are asked to be: the prompts, or the labels (all by default), in turn.

    Raises:
        ArgumentError: prompts for a model that is told none, or none for one that is.
    """
    if source.text is None:
        if prompts is not None:
            raise ArgumentError(f"prompts: {source.name} is told none; expected none, or a text-to-image model")
        return labels_of(source, count, class_labels)
    if class_labels is not None or not prompts:
        raise ArgumentError(
            f"prompts: {source.name} draws what prompts say; expected at least one, and no class labels"
        )
    return [prompts[i % len(prompts)] for i in range(count)]


def labels_of(source: Source, count: int, class_labels: Sequence[int] | None) -> Tensor | None:
    """Labels int64 [count]: the given classes in turn, all classes by default; None for an unconditional model.

    Raises:
        ArgumentError: a class the model does not have, or classes asked of an unconditional model.
    """
    classes = source.model.num_classes
    if classes is None:
        if class_labels:
            raise ArgumentError(f"class_labels: {source.name} is unconditional; expected none")
        return None
    chosen = list(range(classes)) if not class_labels else list(class_labels)
    for label in chosen:
        if not 0 <= label < classes:
            raise ArgumentError(f"class_labels: got {label}, expected 0 to {classes - 1}")
    return torch.tensor(chosen)[torch.arange(count) % len(chosen)]


def check_counts(num_images: int, batch_size: int, seed: int) -> None:
    """Raises ArgumentError unless there is something to generate."""
    if num_images < 1:
        raise ArgumentError(f"num_images: expected at least 1, got {num_images}")
    if batch_size < 1:
        raise ArgumentError(f"batch_size: expected at least 1, got {batch_size}")
    if not 0 <= seed < 2**64:
        raise ArgumentError(f"seed: expected 0 to 2^64 - 1, got {seed}")


def batches(
    source: Source,
    seed: int,
    indices: range,
    told: Told,
    batch_size: int,
    device: torch.device,
    *,
    progress: bool,
) -> Iterator[tuple[range, Tensor]]:
    """(indices, images) in order, under a progress bar with images/s."""
    with (
        nullcontext() if source.text is None else source.text.on(device),
        tqdm(total=len(indices), desc="generate", unit="img", disable=not progress, mininterval=0.5) as bar,
    ):
        for first in range(0, len(indices), batch_size):
            part = indices[first : first + batch_size]
            yield part, source.sample(seed, part, None if told is None else told[part.start : part.stop], device)
            bar.update(len(part))


def generate(
    checkpoint: str | Path,
    *,
    num_images: int,
    output: str | Path,
    seed: int = 0,
    batch_size: int = 256,
    class_labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    num_steps: int = 18,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    resolution: int | None = None,
    network: str | None = None,
    device: str = "auto",
) -> Path:
    """Writes output/000000.png ... and output/manifest.json, all or nothing.

    Image i depends on (seed, i) and its label alone, up to the float rounding of the device: not on batch size or the
    number of processes.

    Args:
        checkpoint: a student folder, a run folder, or a teacher (an embedded name, a folder or a hub id).
        num_images: at least 1.
        output: a folder that is empty or does not exist.
        seed: in [0, 2^64).
        batch_size: images per evaluation and process.
        class_labels: classes to draw, in turn; all by default.
        prompts: what a text-to-image model draws, in turn.
        num_steps: of Heun's method, for a teacher: 2 num_steps - 1 evaluations an image. A student takes as many as it
            was trained for.
        guidance_scale: of a teacher that knows a label for "no class", or is told prompts; 1 is off. A student has
            learnt its teacher's.
        negative_prompt: what guidance of a text-to-image teacher leads away from.
        resolution: of a text-to-image teacher, where it is not its own.
        network: "module:function" of a student of a user's own network.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The output folder.

    Raises:
        ArgumentError, CheckpointError, OutputError: before anything is written; a full disk later on leaves nothing
            behind.
    """
    check_counts(num_images, batch_size, seed)
    state, chosen_device = start(device)
    source = open_source(
        checkpoint,
        chosen_device,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        resolution=resolution,
        network=network,
    )
    told = told_of(source, num_images, class_labels, prompts)
    cut = "" if source.text is None or prompts is None else describe_cut(source.text.cut(prompts), prompts)
    if cut and state.is_main_process:
        tqdm.write(cut)
    folder = claim_folder(Path(output)) if state.is_main_process else Path(output).resolve()
    share = -(-num_images // state.num_processes)
    mine = range(num_images)[state.process_index * share : (state.process_index + 1) * share]
    main = state.is_main_process
    with (
        writing(folder),
        atomic_folder(folder) if main else nullcontext(partial_path(folder)) as temporary,
        counted_evaluations(source.denoiser) as counted,
    ):
        state.wait_for_everyone()
        seconds = 0.0
        before = time.perf_counter()
        for part, images in batches(source, seed, mine, told, batch_size, chosen_device, progress=main):
            seconds += time.perf_counter() - before
            counted.images += len(part)
            for index, image in zip(part, images, strict=True):
                to_pil(image).save(temporary / f"{index:06d}.png")
            before = time.perf_counter()
        state.wait_for_everyone()
        if main:
            manifest = {
                "checkpoint": source.name,
                "checkpoint_sha256": source.weights_sha256,
                "kind": "teacher" if source.num_steps else "student",
                "evaluations_per_image": counted.per_image,
                "num_images": num_images,
                "seed": seed,
                "labels": told.tolist() if isinstance(told, Tensor) else None,
                **({} if source.text is None else {"prompts": told, "negative_prompt": negative_prompt}),
                "guidance": source.guidance_scale,
                "batch_size": batch_size,
                "processes": state.num_processes,
                "device": str(chosen_device),
                "images_per_second": num_images / max(seconds, 1e-9),  # the main process has the largest share
                "fdistill_version": __version__,
                "torch_version": torch.__version__,
            }
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Path(output)
