"""The answer about the teacher: what its configs say, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdistill.adapters.checkpoint import find_network
from fdistill.adapters.parametrisation import read_scheduler_config
from fdistill.base.errors import ArgumentError
from fdistill.base.files import not_weights, read_json_object
from fdistill.config.reading import validate
from fdistill.denoiser import Denoiser
from fdistill.noise import EDMSchedule, FlowSchedule
from fdistill.planning.weightless import latent_factor, open_without_weights

_ONE_FILE = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class TeacherAnswer:
    """A teacher, as its configs describe it.

    Attributes:
        name, base: as the settings teacher and teacher_base have them.
        folder: where the configs are.
        pipeline: class of the pipeline; "" for a network alone.
        network: class of the network.
        settings: config.json of the network.
        scheduler: config of the scheduler; empty without one.
        denoiser: on tensors without values.
        factor: pixels for each latent, along a side; None for a teacher without an autoencoder.
    """

    name: str
    base: str | None
    folder: Path
    pipeline: str
    network: str
    settings: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    denoiser: Denoiser
    factor: int | None

    @property
    def takes_prompts(self) -> bool:
        """Whether it is a text-to-image teacher."""
        return self.denoiser.text_shapes is not None

    @property
    def size(self) -> int:
        """Side of its images in pixels."""
        return self.denoiser.sample_shape[-1] * (self.factor or 1)

    @property
    def levels(self) -> str:
        """What its noise levels are: flow, sigma or timesteps."""
        schedule = self.denoiser.schedule
        if isinstance(schedule, FlowSchedule):
            return "flow"
        return "sigma" if isinstance(schedule, EDMSchedule) else "timesteps"

    def describe(self) -> str:
        """A sentence for the config's comment."""
        millions = sum(parameter.numel() for parameter in self.denoiser.parameters()) / 1e6
        kind = f"{self.pipeline} with a {self.network}" if self.pipeline else self.network
        condition = "prompts" if self.takes_prompts else f"{self.denoiser.num_classes or 'no'} classes"
        return (
            f"a {kind} of {millions:,.1f} M parameters; it takes {condition} and makes {self.size} x {self.size} pixels"
        )


def needs_base(name: str) -> bool:
    """Whether a teacher is a file of weights, which do not say what pipeline they belong to."""
    path = Path(name)
    return path.is_file() and path.suffix.lower() in _ONE_FILE


def read_teacher(name: str, base: str | None) -> TeacherAnswer:
    """Reads the configs of a teacher; of a single file, those of the pipeline that it was made from.

    Raises:
        ArgumentError: a file has no base, or something else has one.
        CheckpointError, ConfigError: nothing is there, or of a family that is not supported.
    """
    if needs_base(name):
        damage = not_weights(Path(name))
        if damage is not None:
            raise ArgumentError(f"teacher: {name!r}: {damage}")
        if base is None:
            raise ArgumentError(
                f"base: teacher {name!r} is a file, which does not say its pipeline; pass --base with the folder or "
                "hub id of the pipeline that it was made from"
            )
    elif base is not None:
        raise ArgumentError(f"base: got {base!r}, but teacher {name!r} is no file of weights; leave --base out")
    config = validate({"teacher": name, "teacher_base": base})
    opened = open_without_weights(config)
    folder = opened.checkpoint.folder
    assert folder is not None
    _, place = find_network(folder)
    return TeacherAnswer(
        name,
        base,
        folder,
        str(opened.checkpoint.index.get("_class_name", "")),
        type(opened.denoiser.network).__name__,
        read_json_object(place / "config.json"),
        read_scheduler_config(folder) or {},
        opened.denoiser,
        latent_factor(config, opened.checkpoint),
    )
