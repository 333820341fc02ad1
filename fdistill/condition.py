"""What a network is conditioned on: class labels [B], or the text encoders' outputs for B prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.base.devices import upload
from fdistill.base.errors import ArgumentError

__all__ = ["Condition", "TextCondition"]


@dataclass(frozen=True)
class TextCondition:
    """The text encoders' outputs for B prompts.

    Attributes:
        tensors: the outputs by name, each with B as its first dimension: "prompt_embeds" [B, L, D], and what else the
            model family takes, such as "pooled_prompt_embeds" [B, D] or "prompt_attention_mask" [B, L].
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if len({len(value) for value in self.tensors.values()}) != 1:
            shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
            raise ArgumentError(f"TextCondition: expected tensors with the same first dimension, got {shapes}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, index: Tensor | slice) -> TextCondition:
        """The prompts at an index [N] (on the same device) or in a slice; an index may repeat a prompt."""
        return TextCondition({name: value[index] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TextCondition:
        """The same prompts on another device."""
        return TextCondition(
            {name: value.to(device, non_blocking=non_blocking) for name, value in self.tensors.items()}
        )

    def at_size(self, height: int, width: int) -> TextCondition:
        """The same prompts for images of so many pixels: the tensors of `SIZES` are replaced, where there are any."""
        return TextCondition(
            {
                name: value.new_tensor(SIZES[name](height, width)).expand_as(value) if name in SIZES else value
                for name, value in self.tensors.items()
            }
        )

    def repeated(self, count: int) -> TextCondition:
        """Repeats one prompt [1, ...] `count` times, without copying its tensors."""
        return TextCondition({name: value.expand(count, *value.shape[1:]) for name, value in self.tensors.items()})

    @staticmethod
    def concat(parts: Sequence[TextCondition]) -> TextCondition:
        """Joins batches of prompts; ArgumentError if they come from different encoders or differ in length."""
        names = parts[0].tensors.keys()
        try:
            if any(part.tensors.keys() != names for part in parts):
                raise RuntimeError(f"tensors {[sorted(part.tensors) for part in parts]}")
            return TextCondition({name: torch.cat([part.tensors[name] for part in parts]) for name in names})
        except RuntimeError as error:
            raise ArgumentError(
                f"TextCondition: prompts of different encoders cannot be joined ({str(error).splitlines()[0]}); encode "
                "all of them with the encoders of one teacher"
            ) from error


#: What a prompt's tensors say about its image, by name: functions of height and width in pixels, as pipelines set them.
SIZES: dict[str, Callable[[int, int], tuple[float, ...]]] = {
    "time_ids": lambda height, width: (height, width, 0, 0, height, width),  # SDXL: original size, crop, target size
    "resolution": lambda height, width: (height, width),  # PixArt-alpha, and the next
    "aspect_ratio": lambda height, width: (height / width,),
}

#: Labels int64 [B], or prompts.
Condition = Tensor | TextCondition


def concat(first: Condition, second: Condition) -> Condition:
    """Joins two batches of conditions; ArgumentError if they are of different kinds."""
    if isinstance(first, TextCondition) and isinstance(second, TextCondition):
        return TextCondition.concat([first, second])
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    raise ArgumentError(f"condition: {type(first).__name__} and {type(second).__name__} cannot be joined")


def where(mask: Tensor, first: Condition, second: Condition) -> Condition:
    """Takes each row from `first` where mask [B] bool is True, else from `second`."""
    if isinstance(first, TextCondition) and isinstance(second, TextCondition):
        return TextCondition(
            {
                name: torch.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, second[name])
                for name, value in first.tensors.items()
            }
        )
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    return torch.where(mask, first, second)


def none_like(condition: Condition, none: TextCondition | int) -> Condition:
    """Repeats `none`, the null label or the one null prompt, once for each row of `condition`, whose sizes it takes."""
    if isinstance(condition, TextCondition):
        assert isinstance(none, TextCondition)
        sizes = {name: value for name, value in condition.tensors.items() if name in SIZES}
        return TextCondition({**none.repeated(len(condition)).tensors, **sizes})
    assert isinstance(none, int)
    return torch.full_like(condition, none)


def as_labels(condition: Condition | None, num_classes: int | None) -> Tensor | None:
    """Checks that a condition is labels [B], or None for a network without classes; ArgumentError otherwise."""
    if isinstance(condition, TextCondition):
        raise ArgumentError("condition: got prompts; this network takes class labels, or no condition")
    if condition is None and num_classes:
        raise ArgumentError(f"condition: got None; this network takes class labels [B] in [0, {num_classes})")
    return condition


def upload_condition(condition: Condition, device: torch.device) -> Condition:
    """Uploads labels, or every tensor of prompts, with `upload`."""
    if isinstance(condition, TextCondition):
        return TextCondition({name: upload(value, device) for name, value in condition.tensors.items()})
    return upload(condition, device)
