"""Images from a student in one evaluation each or a few, or from a teacher with its sampler; in memory or as PNG."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fdistill import __version__
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.base.devices import start
from fdistill.base.errors import ArgumentError, CheckpointError, did_you_mean
from fdistill.base.files import atomic_folder, claim_folder, partial_path, weights_sha256, writing
from fdistill.base.images import to_pil
from fdistill.denoiser import Denoiser
from fdistill.generation.diffusers_pipeline import only_diffusers_runs
from fdistill.generation.maker import Told
from fdistill.generation.network_maker import Source
from fdistill.generation.pipeline_maker import PipelineSource, open_pipeline
from fdistill.guidance import GuidedDenoiser
from fdistill.students.folder import find_student, load_student
from fdistill.teachers.autoencoder import LatentSpace, attach_latent_space, image_size
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import PromptEncoder, open_prompt_encoder

#: What runs a checkpoint: fdistill's own sampler, or the pipeline of diffusers that the checkpoint is.
SAMPLERS = ("heun", "pipeline")


#: Whatever makes images.
ImageSource = Source | PipelineSource


def open_source(
    checkpoint: str | Path,
    device: torch.device,
    *,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    resolution: int | None = None,
    network: str | None = None,
    sampler: str = "heun",
) -> ImageSource:
    """A student folder (or a run that has one), any teacher that `load_teacher` takes, or any pipeline of diffusers.

    Args:
        num_steps, guidance_scale: of a teacher; by default 18 and 1, which is none.
        negative_prompt, resolution: of a text-to-image teacher.
        network: "module:function" of a student of a user's own network.
        sampler: "heun", or "pipeline" for the checkpoint's own class of pipeline and scheduler (see `open_pipeline`).

    Returns:
        A `Source`; a `PipelineSource` with sampler "pipeline".

    Raises:
        CheckpointError: neither.
        ArgumentError: something of a teacher's for a student, which has learnt it.
    """
    if sampler not in SAMPLERS:
        raise ArgumentError(f"sampler: got {sampler!r}; {did_you_mean(sampler, SAMPLERS)}")
    student_folder = find_student(checkpoint)
    if student_folder is not None:
        check_unread(
            f"{checkpoint} is a student, whose training has settled that",
            steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt or None,
            resolution=resolution,
        )
    num_steps = 18 if num_steps is None else num_steps
    guidance_scale = 1.0 if guidance_scale is None else guidance_scale
    if sampler == "pipeline":
        if network is not None:
            raise ArgumentError(
                f"network: got {network!r}, but a network of your own is in no pipeline; leave one of the two out"
            )
        return open_pipeline(
            checkpoint,
            device,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            resolution=resolution,
        )
    if student_folder is not None:
        student = load_student(student_folder, device, network=network)
        found = Checkpoint(str(checkpoint), student_folder)
        latents = attach_latent_space(student.denoiser, found, None)
        text = _prompt_encoder(found, student.denoiser, latents)
        return Source(str(checkpoint), student, None, weights_sha256(student_folder), latents, text)
    check_unread(f"{checkpoint} is no student of a network of your own", network=network)
    if num_steps < 1:
        raise ArgumentError(f"steps: expected at least 1, got {num_steps}")
    try:
        teacher = open_teacher(TeacherSettings(str(checkpoint), resolution=resolution))
    except CheckpointError as error:
        if only_diffusers_runs(checkpoint):
            raise CheckpointError(f"{error}; `--sampler pipeline` runs it with diffusers' own") from error
        raise
    origin, denoiser, latents = teacher.checkpoint, teacher.denoiser.to(device), teacher.latents
    text = _prompt_encoder(origin, denoiser, latents)
    if text is None or guidance_scale == 1 or denoiser.embedded_guidance is not None:
        check_unread(
            f"{checkpoint} is not led away from a prompt, as no text-to-image teacher is without guidance_scale",
            negative_prompt=negative_prompt or None,
        )
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


def check_unread(why: str, **options: object) -> None:
    """Raises ArgumentError if one of the options is given (not None), which nothing would read."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ArgumentError(f"{', '.join(given)}: {why}; leave {'it' if len(given) == 1 else 'them'} out")


def _prompt_encoder(checkpoint: Checkpoint, denoiser: Denoiser, latents: LatentSpace | None) -> PromptEncoder | None:
    if denoiser.text_shapes is None:
        return None
    return open_prompt_encoder(checkpoint, image_size(denoiser, latents))


def told_of(
    source: ImageSource, count: int, class_labels: Sequence[int] | None = None, prompts: Sequence[str] | None = None
) -> Told:
    """What `count` images are asked to be: the prompts, or the labels (all by default), in turn.

    Raises:
        ArgumentError: prompts for a model that is told none, or none for one that is.
    """
    if not source.takes_prompts:
        if prompts is not None:
            raise ArgumentError(f"prompts: {source.name} is told none; expected none, or a text-to-image model")
        return labels_of(source, count, class_labels)
    if class_labels is not None or not prompts:
        raise ArgumentError(
            f"prompts: {source.name} draws what prompts say; expected at least one, and no class labels"
        )
    return [prompts[i % len(prompts)] for i in range(count)]


def labels_of(source: ImageSource, count: int, class_labels: Sequence[int] | None) -> Tensor | None:
    """Labels int64 [count]: the given classes in turn, all classes by default; None for an unconditional model.

    Raises:
        ArgumentError: a class the model does not have, or classes asked of an unconditional model.
    """
    classes = source.num_classes
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
    source: ImageSource,
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
        source.on(device),
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
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    resolution: int | None = None,
    network: str | None = None,
    sampler: str = "heun",
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
        num_steps: of Heun's method, for a teacher: 2 num_steps - 1 evaluations an image; of a pipeline's own scheduler.
            18 by default. A student takes as many as it was trained for, and is given none.
        guidance_scale: of a teacher that knows a label for "no class", or is told prompts; 1, the default, is off. A
            student has learnt its teacher's. A pipeline is called with it: most classes take 0 and 1 for off, and those
            of networks that are told the number (LCM, FLUX.1-dev) tell it.
        negative_prompt: what guidance of a text-to-image teacher leads away from.
        resolution: of a text-to-image teacher, where it is not its own.
        network: "module:function" of a student of a user's own network.
        sampler: "heun", or "pipeline": any pipeline of diffusers with its own scheduler, teachers and students of
            others (LCM, SD-Turbo, ...) alike; a student of fdistill as its card says that other programs call it.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The output folder.

    Raises:
        ArgumentError, CheckpointError, OutputError: before anything is written; a full disk later on leaves nothing
            behind.
        NonFiniteError: an image is not finite; nothing is left behind either.
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
        sampler=sampler,
    )
    told = told_of(source, num_images, class_labels, prompts)
    cut = "" if prompts is None else source.cut(prompts)
    if cut and state.is_main_process:
        tqdm.write(cut)
    folder = claim_folder(Path(output)) if state.is_main_process else Path(output).resolve()
    share = -(-num_images // state.num_processes)
    mine = range(num_images)[state.process_index * share : (state.process_index + 1) * share]
    main = state.is_main_process
    with (
        writing(folder),
        atomic_folder(folder) if main else nullcontext(partial_path(folder)) as temporary,
        source.counted() as counted,
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
                "kind": source.kind,
                "sampler": source.sampler,
                "steps": source.num_steps,
                "evaluations_per_image": counted.per_image,
                "num_images": num_images,
                "seed": seed,
                "labels": told.tolist() if isinstance(told, Tensor) else None,
                **({"prompts": told, "negative_prompt": negative_prompt} if source.takes_prompts else {}),
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
