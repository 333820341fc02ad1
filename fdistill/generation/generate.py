"""Images from a student, a teacher or a diffusers pipeline, as PNG files; `fdistill generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fdistill import __version__
from fdistill.adapters.blocks import compile_blocks
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.base.cores import shared_cores
from fdistill.base.devices import autocast, start
from fdistill.base.distributed import from_main_process, wait_for_everyone
from fdistill.base.errors import ArgumentError, CheckpointError, did_you_mean
from fdistill.base.files import atomic_folder, claimed_folder, weights_sha256, writing
from fdistill.denoiser import Denoiser
from fdistill.generation.batch_size import fastest
from fdistill.generation.diffusers_pipeline import only_diffusers_runs
from fdistill.generation.image_files import image_files
from fdistill.generation.maker import Evaluations, LabelsOrPrompts, Maker, describe_maker
from fdistill.generation.network_maker import NetworkMaker
from fdistill.generation.pipeline_maker import open_pipeline
from fdistill.generation.sampling import Sampling, check_unread
from fdistill.guidance import GuidedDenoiser
from fdistill.students.experts import experts_in
from fdistill.students.folder import fetch_student, load_student
from fdistill.teachers.autoencoder import LatentSpace, attach_latent_space, image_size
from fdistill.teachers.guide import Guide, open_guide
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import PromptEncoder, open_prompt_encoder

_DEFAULTS = Sampling()
_MOST_AT_ONCE = 256


def open_maker(checkpoint: str | Path, device: torch.device, sampling: Sampling = _DEFAULTS) -> Maker:
    """Opens what makes images of a checkpoint: a `PipelineMaker` with sampler "pipeline", else a `NetworkMaker`.

    Args:
        checkpoint: a student's folder, run folder or hub id, any teacher that `load_teacher` takes, or a diffusers
            pipeline.

    Raises:
        CheckpointError: it is none of these, or cannot be read.
        ArgumentError: an option that this checkpoint does not read, such as steps for a student.
    """
    folder = fetch_student(checkpoint)
    if folder is not None:
        check_unread(
            f"{checkpoint} is a student; these were fixed in its training",
            sampling.given("guidance_scale", "guidance_teacher", "negative_prompt", "resolution"),
        )
    if sampling.sampler == "pipeline":
        if folder is not None:
            check_unread(
                f"{checkpoint} is a student, whose pipeline is called with its own steps; sampler heun takes others",
                sampling.given("steps"),
            )
            if experts_in(folder):
                raise ArgumentError(
                    f"sampler: got 'pipeline', but {checkpoint} has experts that take one after another of the steps, "
                    "which its pipeline alone does not change; expected heun, or the code in its README.md"
                )
        return open_pipeline(checkpoint, device, sampling)
    if folder is not None:
        return _student_maker(checkpoint, folder, device, sampling)
    check_unread("applies only to students of your own network", sampling.given("network"))
    return teacher_maker(TeacherSettings(str(checkpoint), resolution=sampling.resolution), device, sampling)


def _student_maker(checkpoint: str | Path, folder: Path, device: torch.device, sampling: Sampling) -> NetworkMaker:
    student = load_student(folder, device, network=sampling.network, steps=sampling.num_steps)
    found = Checkpoint(str(checkpoint), folder)
    latents = attach_latent_space(student.denoiser, found, None)
    text = _prompt_encoder(found, student.denoiser, latents)
    return NetworkMaker(str(checkpoint), student, None, weights_sha256(folder), latents, text)


def teacher_maker(settings: TeacherSettings, device: torch.device, sampling: Sampling) -> NetworkMaker:
    """Opens a teacher with Heun's sampler; raises what `open_maker` does, and ConfigError as `open_teacher` says."""
    checkpoint = settings.name
    try:
        teacher = open_teacher(settings)
    except CheckpointError as error:
        if only_diffusers_runs(checkpoint):
            raise CheckpointError(f"{error}; `--sampler pipeline` runs it with diffusers itself") from error
        raise
    origin, denoiser, latents = teacher.checkpoint, teacher.denoiser.to(device), teacher.latents
    text = _prompt_encoder(origin, denoiser, latents)
    if text is None or sampling.scale == 1 or denoiser.embedded_guidance is not None:
        check_unread(
            f"applies only to a text-to-image teacher with guidance (guidance_scale other than 1), and {checkpoint} is "
            "none",
            sampling.given("negative_prompt"),
        )
    sha256 = weights_sha256(origin.folder) if origin.folder else origin.fingerprint(denoiser)
    guide = _guide(checkpoint, denoiser, sampling)
    if denoiser.embedded_guidance is not None:
        denoiser.embedded_guidance = sampling.scale
    elif sampling.scale != 1:
        null = None
        if guide is not None:
            sha256 = guide.joined(sha256)
        elif text is not None:
            with text.on(device):
                null = text.null(sampling.negative_prompt)
        other = None if guide is None else guide.denoiser.to(device)
        denoiser = GuidedDenoiser(denoiser, sampling.scale, null=null, guide=other).to(device)
    return NetworkMaker(checkpoint, denoiser, sampling.steps, sha256, latents, text, sampling.scale)


def _guide(checkpoint: str, denoiser: Denoiser, sampling: Sampling) -> Guide | None:
    """The second network of guidance; ArgumentError if guidance is off, or leads away from a prompt as well."""
    if sampling.guidance_teacher is None:
        return None
    if sampling.scale == 1 or denoiser.embedded_guidance is not None:
        check_unread(
            f"applies only with guidance (guidance_scale other than 1), and {checkpoint} has none",
            sampling.given("guidance_teacher"),
        )
    check_unread("guidance leads away from guidance_teacher", sampling.given("negative_prompt"))
    return open_guide(sampling.guidance_teacher, denoiser)


def _prompt_encoder(checkpoint: Checkpoint, denoiser: Denoiser, latents: LatentSpace | None) -> PromptEncoder | None:
    if denoiser.text_shapes is None:
        return None
    return open_prompt_encoder(checkpoint, image_size(denoiser, latents))


def labels_or_prompts(
    maker: Maker, count: int, class_labels: Sequence[int] | None = None, prompts: Sequence[str] | None = None
) -> LabelsOrPrompts:
    """The condition of each of `count` images: prompts in turn, or labels int64 [count] in turn (all by default).

    Raises:
        ArgumentError: prompts for a model without prompts, none for a text-to-image model, a class that the model does
            not have, or classes for an unconditional model.
    """
    if not maker.takes_prompts:
        if prompts is not None:
            raise ArgumentError(f"prompts: {maker.name} takes none; leave them out, or choose a text-to-image model")
        return _labels(maker, count, class_labels)
    if class_labels is not None or not prompts:
        raise ArgumentError(
            f"prompts: {maker.name} is a text-to-image model; expected at least one prompt, and no class labels"
        )
    return [prompts[i % len(prompts)] for i in range(count)]


def _labels(maker: Maker, count: int, class_labels: Sequence[int] | None) -> Tensor | None:
    classes = maker.num_classes
    if classes is None:
        if class_labels:
            raise ArgumentError(f"class_labels: {maker.name} is unconditional; leave them out")
        return None
    chosen = list(range(classes)) if not class_labels else list(class_labels)
    for label in chosen:
        if not 0 <= label < classes:
            raise ArgumentError(f"class_labels: got {label}, expected 0 to {classes - 1}")
    return torch.tensor(chosen)[torch.arange(count) % len(chosen)]


def check_counts(num_images: int, batch_size: int, seed: int) -> None:
    """Raises ArgumentError unless num_images and batch_size are at least 1 and the seed is in [0, 2^64)."""
    if num_images < 1:
        raise ArgumentError(f"num_images: expected at least 1, got {num_images}")
    if batch_size < 1:
        raise ArgumentError(f"batch_size: expected at least 1, got {batch_size}")
    if not 0 <= seed < 2**64:
        raise ArgumentError(f"seed: expected 0 to 2^64 - 1, got {seed}")


def generate(
    checkpoint: str | Path,
    *,
    num_images: int,
    output: str | Path,
    seed: int = 0,
    batch_size: int | None = 256,
    class_labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_teacher: str | None = None,
    negative_prompt: str = "",
    resolution: int | None = None,
    size: tuple[int, int] | None = None,
    network: str | None = None,
    sampler: str = "heun",
    precision: str = "fp32",
    compiled: bool = False,
    device: str = "auto",
) -> Path:
    """Writes output/000000.png, output/000001.png, ... and output/manifest.json: either all of them or nothing.

    Image i depends on (seed, i) and its label or prompt alone, up to the float rounding of the device. It does not
    depend on the batch size or the number of processes.

    Args:
        checkpoint: a student folder, a run folder, or a teacher (an embedded name, a folder or a hub id).
        num_images: at least 1.
        output: a folder that is empty or does not exist.
        seed: in [0, 2^64).
        batch_size: images in one evaluation of each process; None means that those sizes are tried first which fit the
            memory, up to 256, and the one that makes most images a second is taken.
        class_labels: classes to draw, in turn; all classes by default.
        prompts: prompts for a text-to-image model, in turn.
        num_steps: steps of a teacher (Heun's method: 2 num_steps - 1 evaluations for each image) or of a pipeline's own
            scheduler; 18 by default. A student takes its own number of steps unless it is given, see `load_student`.
        guidance_scale: guidance of a teacher that is conditional on prompts, or that has a label for "no class"; 1, the
            default, is no guidance. It cannot be given for a student, which has learnt its teacher's guidance. A
            pipeline is called with this number: for most classes 0 and 1 both mean no guidance, but networks that take
            the scale as an input (LCM, FLUX.1-dev) read it.
        guidance_teacher: a second network that guidance leads away from, such as one without classes or a weaker one: a
            folder, a hub id or "module:function". By default guidance leads away from no condition.
        negative_prompt: what the guidance of a text-to-image teacher steers away from.
        resolution: side of a text-to-image teacher's images in pixels; the teacher's own by default.
        size: height and width in pixels of a text-to-image model's images, for one that is not square or a student that
            is asked for another size than it was trained at; its own by default.
        network: "module:function" for a student whose network is your own code.
        sampler: "heun" runs fdistill's samplers. "pipeline" runs the checkpoint as the diffusers pipeline that it is,
            with its own scheduler: teachers, other people's fast models (LCM, SD-Turbo, ...), or a student of fdistill
            as other programs run it.
        precision: "fp32", or "bf16" for networks that compute in bfloat16 under float32 samplers.
        compiled: run each block of the networks through torch.compile, which takes a minute or more before the first
            images, and again for a last batch that is smaller; for many images. It changes images by rounding alone.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The output folder.

    Raises:
        ArgumentError, CheckpointError, OutputError: before anything is written; OutputError also for a full disk later
            on, which leaves nothing behind.
        NonFiniteError: an image is not finite; nothing is left behind either.
    """
    check_counts(num_images, 1 if batch_size is None else batch_size, seed)
    if precision not in ("fp32", "bf16"):
        raise ArgumentError(f"precision: got {precision!r}; {did_you_mean(precision, ('fp32', 'bf16'))}")
    sampling = Sampling(
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        guidance_teacher=guidance_teacher,
        negative_prompt=negative_prompt,
        resolution=resolution,
        network=network,
        sampler=sampler,
    )
    if size is not None and resolution is not None:
        raise ArgumentError(
            f"resolution: got {resolution} beside size {size}, which replaces it; leave one of them out"
        )
    state, chosen_device = start(device)
    maker = open_maker(checkpoint, chosen_device, sampling)
    if size is not None:
        if not isinstance(maker, NetworkMaker):
            raise ArgumentError("size: a diffusers pipeline draws at its own size; leave it out, or use sampler=heun")
        maker = maker.at_size(*size)
    condition = labels_or_prompts(maker, num_images, class_labels, prompts)
    if compiled:
        for evaluated in maker.networks:
            compile_blocks(evaluated)
    order = _Order(maker, condition, num_images, seed, batch_size or 0, precision, compiled, chosen_device)
    if batch_size is None:
        order = replace(order, batch_size=from_main_process(lambda: _fastest_batch(order)))
    main, processes = state.is_main_process, state.num_processes
    if main:
        tqdm.write(f"checkpoint {maker.name}: {describe_maker(maker)}", file=sys.stderr)
    cut = "" if prompts is None else maker.cut(prompts)
    if cut and main:
        tqdm.write(cut)
    if prompts is not None and main:
        tqdm.write(_drawn(len(prompts), num_images), file=sys.stderr)
    share = -(-num_images // processes)
    mine = range(num_images)[state.process_index * share : (state.process_index + 1) * share]
    with writing(Path(output)), ExitStack() as stack, maker.counted() as counted:
        temporary = from_main_process(lambda: _open_output(Path(output), stack))
        seconds = _save_images(order, mine, temporary, counted, progress=main)
        wait_for_everyone()
        if main:
            manifest = _manifest(order, sampling, counted, seconds, processes)
            manifest |= {} if prompts is None else {"prompts_given": len(prompts)}
            manifest |= {} if size is None else {"size": size}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Path(output)


def _drawn(prompts: int, images: int) -> str:
    """The line about what was read: how prompts go with images."""
    which = "each once" if prompts == images else "in turn"
    if prompts > images:
        which = f"of which the first {images:,} are drawn"
    return f"prompts: {prompts:,} for {images:,} images, {which}"


def _open_output(output: Path, stack: ExitStack) -> Path:
    """The folder that all processes fill, which becomes `output` when the stack ends."""
    return stack.enter_context(atomic_folder(stack.enter_context(claimed_folder(output))))


@dataclass(frozen=True)
class _Order:
    """The images that `generate` is to make."""

    maker: Maker
    condition: LabelsOrPrompts
    num_images: int
    seed: int
    batch_size: int
    precision: str
    compiled: bool
    device: torch.device

    def make(self, part: range) -> Tensor:
        """The images of these indices, uint8 [N, C, H, W] on the CPU; inside `maker.on`."""
        conditions = None if self.condition is None else self.condition[part.start : part.stop]
        with autocast(self.device, self.precision):
            return self.maker.sample(self.seed, part, conditions, self.device)


def _fastest_batch(order: _Order) -> int:
    with order.maker.on(order.device):
        return fastest(lambda size: order.make(range(size)), min(_MOST_AT_ONCE, order.num_images))


def _save_images(order: _Order, indices: range, folder: Path, counted: Evaluations, *, progress: bool) -> float:
    """Writes these images, and returns the seconds that it took to make them."""
    seconds = 0.0
    with image_files(folder, order.device) as files:
        before = time.perf_counter()
        for part, images in _batches(order, indices, progress=progress):
            seconds += time.perf_counter() - before
            counted.images += len(part)
            files.write(part, images)
            before = time.perf_counter()
    return seconds


def _batches(order: _Order, indices: range, *, progress: bool) -> Iterator[tuple[range, Tensor]]:
    """Yields (indices, images) of one batch after another, under a progress bar."""
    size = order.batch_size
    with (
        shared_cores(order.device, compiled=order.compiled) as follow,
        order.maker.on(order.device),
        tqdm(total=len(indices), desc="generate", unit="img", disable=not progress, mininterval=0.5) as bar,
    ):
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            yield part, order.make(part)
            follow()
            bar.update(len(part))


def _manifest(
    order: _Order, sampling: Sampling, counted: Evaluations, seconds: float, processes: int
) -> dict[str, Any]:
    """What manifest.json says. `seconds` are those of the main process, whose share of the images is the largest."""
    maker, condition = order.maker, order.condition
    return {
        "checkpoint": maker.name,
        "checkpoint_sha256": maker.weights_sha256,
        "kind": maker.kind,
        "sampler": maker.sampler,
        "steps": maker.num_steps,
        "evaluations_per_image": counted.per_image,
        "num_images": order.num_images,
        "seed": order.seed,
        "labels": condition.tolist() if isinstance(condition, Tensor) else None,
        **({"prompts": condition, "negative_prompt": sampling.negative_prompt} if maker.takes_prompts else {}),
        "guidance": maker.guidance_scale,
        **({} if sampling.guidance_teacher is None else {"guidance_teacher": sampling.guidance_teacher}),
        "batch_size": order.batch_size,
        "precision": order.precision,
        "processes": processes,
        "device": str(order.device),
        "images_per_second": order.num_images / max(seconds, 1e-9),
        "fdistill_version": __version__,
        "torch_version": torch.__version__,
    }
