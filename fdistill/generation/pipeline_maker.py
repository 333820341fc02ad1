"""Images from any diffusers pipeline, run as diffusers runs it: by its own class and its own scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdistill.adapters import FAMILIES, guidance_offset
from fdistill.adapters.checkpoint import Checkpoint, find_network, resolve_checkpoint
from fdistill.base.errors import ArgumentError, CheckpointError, FDistillError
from fdistill.base.files import weights_sha256
from fdistill.base.rng import Stream, derived_seed
from fdistill.generation.diffusers_pipeline import (
    call_parameters,
    evaluated_networks,
    load_pipeline,
    one_line,
)
from fdistill.generation.maker import Evaluations, LabelsOrPrompts, finite_uint8
from fdistill.generation.sampling import Sampling
from fdistill.students.folder import checked_facts, fetch_student
from fdistill.students.student_pipeline import StudentPipeline
from fdistill.teachers.text_encoders import PromptEncoder, describe_cut, quiet


def noise_seed(seed: int, index: int, stream: Stream = Stream.PIPELINE) -> int:
    """The seed, in [0, 2^32), of the torch.Generator of image `index`; no two images of one `seed` share it.

    torch's generators on the CPU read 32 bits of a seed, and 32-bit hashes of (seed, index) would collide among 50,000
    images. So only `seed` is hashed, and `index` is added.
    """
    return (derived_seed(seed, stream) + index) % 2**32


class PipelineMaker:
    """A `Maker` that calls a diffusers pipeline; `open_pipeline` makes one.

    All noise of an image, the scheduler's too, comes from one torch.Generator on the CPU that is seeded with
    `noise_seed`, so that anybody can make image i again with diffusers alone. It is other noise than `NetworkMaker`
    starts from, because each pipeline has its own layout of latents. Some pipelines also draw noise from torch's global
    generator (DiT with a DDPM scheduler does): these run one image at a time, so that image i depends on (seed, i) and
    its condition alone here too.

    Args:
        name: the checkpoint, as the user gave it.
        folder: where the pipeline was loaded from.
        pipeline: a diffusers pipeline on its device.
        call: keyword arguments of each call.
        negative_prompt: "" leaves the pipeline its own.
        student: what fdistill_student.json says, if it is a student of fdistill.

    Attributes:
        kind: "student" for a student of fdistill, else "pipeline".
        num_steps: as the pipeline is called.
        guidance_scale: with which the pipeline is called, in the usual sense: 1 is none; None if its class takes none,
            and for students.
        num_classes: class labels are in [0, num_classes); None if it takes no labels.
        weights_sha256: hash of all weight files.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        pipeline: Any,
        call: Mapping[str, Any],
        negative_prompt: str = "",
        student: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.kind = "pipeline" if student is None else "student"
        self.weights_sha256 = weights_sha256(folder)
        self.takes_prompts = _takes_prompts(pipeline)
        self.num_classes = _num_classes(pipeline)
        if student is not None and student.get("null_class") is not None:
            self.num_classes = student["null_class"]  # the label after the last class
        self.num_steps = _num_steps(pipeline, call)
        scale = call.get("true_cfg_scale", call.get("guidance_scale"))
        usual = None if scale is None else scale - guidance_offset(type(pipeline).__name__)
        self.guidance_scale: float | None = usual if student is None else None
        self._folder, self._pipeline, self._call = folder, pipeline, dict(call)
        self._negative = negative_prompt if negative_prompt or call.get("true_cfg_scale", 1) > 1 else None
        self._batched = "batch_size" in call_parameters(type(pipeline)) and not self.takes_prompts
        self._draws_alone: bool | None = None  # not known before the first image
        self._counting: Evaluations | None = None

    @property
    def sampler(self) -> str:
        """The names of the pipeline's class and of its scheduler's."""
        scheduler = getattr(self._pipeline, "scheduler", None)
        return type(self._pipeline).__name__ + ("" if scheduler is None else f", {type(scheduler).__name__}")

    @property
    def networks(self) -> Sequence[nn.Module]:
        """What is evaluated in sampling steps."""
        return evaluated_networks(self._pipeline)

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Does nothing: the whole pipeline is on its device already."""
        return nullcontext()

    def cut(self, prompts: Sequence[str]) -> str:
        """One sentence on prompts that are too long; empty if there are none, or no adapter knows the tokenizers."""
        try:
            family, _ = find_network(self._folder)
        except CheckpointError:
            return ""
        if not self.takes_prompts or family.text is None:
            return ""
        return describe_cut(PromptEncoder(family.text, self._pipeline, 0).cut(prompts), prompts)

    @contextmanager
    def counted(self) -> Iterator[Evaluations]:
        """Counts network evaluations inside the block, one for each sample; the caller counts the images."""
        counted = Evaluations()

        def count(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            first = arguments[0] if arguments else next(iter(options.values()))
            counted.network += len(first)  # a batch, or a list of samples

        hooks = [
            network.register_forward_pre_hook(count, with_kwargs=True)
            for network in ([] if isinstance(self._pipeline, StudentPipeline) else evaluated_networks(self._pipeline))
        ]
        self._counting = counted
        try:
            yield counted
        finally:
            self._counting = None
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def sample(self, seed: int, indices: Sequence[int], condition: LabelsOrPrompts, device: torch.device) -> Tensor:
        """As `Maker.sample`.

        Raises:
            ArgumentError: the pipeline refuses the call.
            CheckpointError: the pipeline returns something else than images.
            NonFiniteError: an image is not finite.
        """
        listed = None
        if condition is not None:
            listed = condition.tolist() if isinstance(condition, Tensor) else list(condition)
        images: list[Tensor] = []
        while len(images) < len(indices):
            first = len(images)
            last = len(indices) if self._draws_alone is False else first + 1
            part = indices[first:last]
            images.extend(self._draw(seed, part, None if listed is None else listed[first:last], device))
        return finite_uint8(torch.stack(images) * 2 - 1, indices, self.name)

    def _draw(self, seed: int, indices: Sequence[int], condition: list[Any] | None, device: torch.device) -> Tensor:
        """Images float [N, C, H, W] in [0, 1] from one call of the pipeline."""
        generators = [torch.Generator().manual_seed(noise_seed(seed, index)) for index in indices]
        call: dict[str, Any] = {**self._call, "generator": generators if len(generators) > 1 else generators[0]}
        if condition is not None:
            call["prompt" if self.takes_prompts else "class_labels"] = condition
        if self._batched:
            call["batch_size"] = len(indices)
        if self._negative is not None:
            call["negative_prompt"] = [self._negative] * len(indices)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(noise_seed(seed, indices[0], Stream.PIPELINE_GLOBAL))
            before = _random_state(device)
            images = self._run(call, len(indices))
            if self._draws_alone is None:
                self._draws_alone = any(
                    not torch.equal(a, b) for a, b in zip(before, _random_state(device), strict=True)
                )
        # A student's pipeline may call parts of its network, where no hook counts.
        if self._counting is not None and isinstance(self._pipeline, StudentPipeline):
            self._counting.network += len(indices) * self.num_steps
        return images

    def _run(self, call: dict[str, Any], count: int) -> Tensor:
        name = type(self._pipeline).__name__
        try:
            with quiet():
                images = self._pipeline(**call, output_type="np").images
        except FDistillError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, ImportError) as error:
            raise ArgumentError(
                f"{self.name}: {name} refuses the call ({one_line(error)}); try other steps, another guidance scale, "
                "resolution or a batch size of 1, or make images with a program of your own and evaluate their folder"
            ) from error
        if not isinstance(images, np.ndarray) or images.ndim != 4 or len(images) != count or images.dtype.kind != "f":
            got = getattr(images, "shape", type(images).__name__)
            raise CheckpointError(f"{self.name}: {name} returned {got}; expected {count} images as floats [N, H, W, C]")
        if images.min() < -1e-3 or images.max() > 1 + 1e-3:  # False for NaN, which `finite_uint8` finds
            raise CheckpointError(
                f"{self.name}: {name} returned values in [{images.min():.3g}, {images.max():.3g}]; expected [0, 1], as "
                "diffusers' pipelines return"
            )
        return torch.from_numpy(images).float().permute(0, 3, 1, 2)


def open_pipeline(checkpoint: str | Path, device: torch.device, sampling: Sampling) -> PipelineMaker:
    """Opens a pipeline in float32 on a device. No code in it is run and no pickle is read.

    Args:
        checkpoint: a pipeline folder or hub id; or a student of fdistill, or a run folder that has one. Students are
            called as their model card says, and read nothing of `sampling`.
        sampling: steps become num_inference_steps. The guidance scale becomes guidance_scale, or true_cfg_scale for
            classes that have this and whose network does not take the scale as an input; pipelines that count it from
            0 are given one less. Resolution becomes height and width.

    Raises:
        CheckpointError: it is no pipeline, files cannot be read, or diffusers does not have its class.
        ArgumentError: the class does not take an option that was given.
    """
    folder = fetch_student(checkpoint)
    if folder is not None:
        facts = checked_facts(folder)
        pipeline = load_pipeline(Checkpoint(str(checkpoint), folder)).to(device)
        return PipelineMaker(str(checkpoint), folder, pipeline, facts.get("call", {}), student=facts)
    found = resolve_checkpoint(checkpoint)
    pipeline = load_pipeline(found)
    assert found.folder is not None
    call = _arguments(found.name, pipeline, sampling)
    return PipelineMaker(found.name, found.folder, pipeline.to(device), call, sampling.negative_prompt)


def _arguments(name: str, pipeline: Any, sampling: Sampling) -> dict[str, Any]:
    """Keyword arguments for the pipeline's call."""
    takes, kind = call_parameters(type(pipeline)), type(pipeline).__name__
    guidance_scale = sampling.scale
    call: dict[str, Any] = {"num_inference_steps": sampling.steps} if "num_inference_steps" in takes else {}
    guided = guidance_scale not in (0, 1)
    if "true_cfg_scale" in takes and not evaluated_networks(pipeline)[0].config.get("guidance_embeds"):
        call["true_cfg_scale"] = guidance_scale
    elif "guidance_scale" in takes:
        call["guidance_scale"] = guidance_scale + guidance_offset(kind)
    elif guided:
        raise ArgumentError(f"guidance_scale: got {guidance_scale:g}, but {kind} of {name} takes none; leave it out")
    labels = {cls: label for family in FAMILIES.values() for cls, label in family.guidance_labels.items()}
    if guided and kind in labels and _num_classes(pipeline) != labels[kind]:
        raise ArgumentError(
            f"guidance_scale: got {guidance_scale:g}, but {kind} guides with label {labels[kind]} for no class, and "
            f"{name} has {_num_classes(pipeline)} classes; leave it out, or leave out `--sampler pipeline`"
        )
    if sampling.negative_prompt and "negative_prompt" not in takes:
        raise ArgumentError(f"negative_prompt: {kind} of {name} takes none; leave it out")
    if sampling.resolution is not None:
        if "height" not in takes:
            raise ArgumentError(f"resolution: {kind} of {name} has a fixed resolution; leave it out")
        call |= {"height": sampling.resolution, "width": sampling.resolution}
    if "use_resolution_binning" in takes:
        call["use_resolution_binning"] = False  # it would draw at another resolution and resize
    return call


def _num_steps(pipeline: Any, call: Mapping[str, Any]) -> int:
    if call.get("num_inference_steps"):
        return int(call["num_inference_steps"])
    listed = call.get("timesteps") or call.get("sigmas") or pipeline.config.get("student", {}).get("levels")
    return len(listed) if listed else 1


def _takes_prompts(pipeline: Any) -> bool:
    if isinstance(pipeline, StudentPipeline):
        return pipeline.takes_prompts
    return "prompt" in call_parameters(type(pipeline))


def _num_classes(pipeline: Any) -> int | None:
    if isinstance(pipeline, StudentPipeline):
        return pipeline.make_student().num_classes
    if "class_labels" not in call_parameters(type(pipeline)):
        return None
    settings = evaluated_networks(pipeline)[0].config
    found = settings.get("num_class_embeds") or settings.get("num_embeds_ada_norm")
    return None if found is None else int(found)


def _random_state(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]
