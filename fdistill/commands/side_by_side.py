"""A student and its teacher, opened to draw the same images, with what each image costs; for `fdistill demo`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fdistill.base.errors import ArgumentError, CheckpointError, FDistillError
from fdistill.base.images import to_pil
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.generation.generate import check_counts, labels_or_prompts, open_maker, teacher_maker
from fdistill.generation.network_maker import NetworkMaker
from fdistill.generation.sampling import Sampling
from fdistill.generator import FewStepGenerator, student_generator
from fdistill.rollout import levels_for
from fdistill.students.folder import student_facts, student_folder
from fdistill.students.phases import PhasedGenerator
from fdistill.teachers.teacher import TeacherSettings

MOST_IMAGES, MOST_CHARACTERS, MOST_SEED, MOST_TEACHER_STEPS = 16, 1000, 2**32 - 1, 50
#: Sides of small images in pixels, after they were enlarged by a whole factor.
_SHOWN = 256


@dataclass(frozen=True)
class Pair:
    """A student, and its teacher or the reason why there is none.

    Attributes:
        steps: the numbers of steps that the student can be asked for, falling; its own alone if it takes no other.
        learnt: which of them it has learnt, in words.
    """

    student: NetworkMaker
    teacher: NetworkMaker | None
    reason: str
    device: torch.device
    steps: Sequence[int]
    learnt: str

    @property
    def same_noise(self) -> bool:
        """Whether both start from the same noise; a student of several steps draws more after it."""
        return self.teacher is not None and self.student.model.sample_shape == self.teacher.model.sample_shape


@dataclass(frozen=True)
class Wish:
    """What somebody asks for. A label of None is all classes in turn.

    Raises:
        ArgumentError: it is more than a page shows, or no number.
    """

    seed: int
    images: int
    prompt: str = ""
    label: int | None = None
    steps: int | None = None
    teacher_steps: int = 18

    def __post_init__(self) -> None:
        bounds = {
            "seed": (self.seed, 0, MOST_SEED),
            "images": (self.images, 1, MOST_IMAGES),
            "teacher's steps": (self.teacher_steps, 1, MOST_TEACHER_STEPS),
        }
        for name, (value, least, most) in bounds.items():
            if not isinstance(value, int) or not least <= value <= most:
                got = "nothing" if value is None else value
                raise ArgumentError(f"{name}: got {got}, expected a whole number from {least} to {most:,}")
        if len(self.prompt) > MOST_CHARACTERS:
            raise ArgumentError(f"prompt: got {len(self.prompt):,} characters, expected at most {MOST_CHARACTERS:,}")


@dataclass(frozen=True)
class Drawn:
    """Images of one side, and what they took.

    Attributes:
        seconds: for each image, decoding included; without the text encoders' way to the device.
        evaluations: of the network, for each image.
    """

    images: Sequence[Image.Image]
    seconds: float
    evaluations: float


def open_pair(student: str, teacher: str | None, device: torch.device) -> Pair:
    """Opens a student and its teacher.

    Args:
        student: a student or run folder.
        teacher: the teacher in place of the one that the student's folder names.

    Raises:
        CheckpointError: there is no student, or it cannot be read. A teacher that cannot be opened is no error.
    """
    folder = student_folder(student)
    maker = open_maker(folder, device)
    assert isinstance(maker, NetworkMaker)
    maker = replace(maker, name=student)
    opened, reason = None, ""
    try:
        opened = _teacher_of(folder, teacher, device)
        _check_alike(maker, opened)
    except (FDistillError, OSError) as error:
        opened, reason = None, f"The teacher is not shown: {error}."
    levels = len(maker.model.levels) if isinstance(maker.model, FewStepGenerator) else 1
    choice = range(levels, 0, -1) if not isinstance(maker.model, PhasedGenerator) else [levels]
    learnt = f"1 to {levels}" if student_facts(folder).get("any_step") else str(levels)
    return Pair(maker, opened, reason, device, choice, learnt)


def _teacher_of(folder: Path, given: str | None, device: torch.device) -> NetworkMaker:
    """The teacher with the guidance that the student has learnt."""
    facts, path = student_facts(folder), folder / "training_config.yaml"
    config = load_config(path) if path.is_file() else None
    named = config.teacher if config is not None else facts.get("teacher")
    if given is None and not isinstance(named, str):
        raise CheckpointError("the student's folder names none; name it with --teacher")
    name = given or str(named)
    if given is None:
        _check_no_code(name)
    settings = TeacherSettings(name)
    if config is not None:
        settings = replace(settings, null_class=config.null_class, resolution=config.resolution)
        if given is None:
            settings = replace(
                settings,
                base=config.teacher_base,
                lora=config.teacher_lora,
                lora_scale=config.teacher_lora_scale,
                vae=config.vae,
            )
    return teacher_maker(settings, device, _guidance(config, facts))


def _guidance(config: DistillConfig | None, facts: dict[str, Any]) -> Sampling:
    scale = facts.get("teacher_guidance", 1.0) if config is None else config.guidance_scale
    if not isinstance(scale, (int, float)) or scale == 1:
        return Sampling()
    if config is None:
        return Sampling(guidance_scale=scale)
    if config.guidance_teacher is not None:
        _check_no_code(config.guidance_teacher)
    return Sampling(
        guidance_scale=scale, guidance_teacher=config.guidance_teacher, negative_prompt=config.negative_prompt
    )


def _check_no_code(name: str) -> None:
    """Raises CheckpointError for "module:function": no folder may choose which code runs."""
    if ":" in name and not Path(name).exists():
        raise CheckpointError(
            f"{name!r} names code, which no student's folder may run; if you trust it, name it with --teacher"
        )


def _check_alike(student: NetworkMaker, teacher: NetworkMaker) -> None:
    def takes(maker: NetworkMaker) -> str:
        classes = "no classes" if maker.num_classes is None else f"{maker.num_classes:,} classes"
        return "prompts" if maker.takes_prompts else classes

    if takes(student) != takes(teacher):
        raise CheckpointError(f"{teacher.name} is for {takes(teacher)}, and the student for {takes(student)}")


def with_steps(maker: NetworkMaker, steps: int) -> NetworkMaker:
    """A student of several steps that takes so many of them, on the same network."""
    model = maker.model
    if not isinstance(model, FewStepGenerator) or steps == len(model.levels):
        return maker
    fewer = student_generator(model.denoiser, levels_for(model.levels, steps), model.sampler)
    return replace(maker, model=fewer.eval())


def draw(pair: Pair, wish: Wish) -> tuple[Drawn, Drawn | None]:
    """The images of both, drawn one after the other.

    Raises:
        ArgumentError: the student has not what is wished for.
        NonFiniteError: an image is not finite.
    """
    steps = pair.steps[0] if wish.steps is None else wish.steps
    if steps not in pair.steps:
        raise ArgumentError(f"steps: got {steps}, expected one of {', '.join(map(str, sorted(pair.steps)))}")
    student = _drawn(with_steps(pair.student, steps), pair.device, wish)
    if pair.teacher is None:
        return student, None
    return student, _drawn(replace(pair.teacher, num_steps=wish.teacher_steps), pair.device, wish)


def _drawn(maker: NetworkMaker, device: torch.device, wish: Wish) -> Drawn:
    check_counts(wish.images, 1, wish.seed)
    labels = None if wish.label is None else [wish.label]
    prompts = [wish.prompt] if maker.takes_prompts else None
    condition = labels_or_prompts(maker, wish.images, labels, prompts)
    with maker.on(device), maker.counted() as counted:
        before = time.perf_counter()
        images = maker.sample(wish.seed, range(wish.images), condition, device)
        seconds = time.perf_counter() - before
    counted.images = wish.images
    return Drawn([_enlarged(to_pil(image)) for image in images], seconds / wish.images, counted.per_image)


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-_SHOWN // min(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
