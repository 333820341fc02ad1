"""What a network is asked for: class labels [B], or what text encoders made of B prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.base.devices import upload
from fdistill.base.errors import ArgumentError


@dataclass(frozen=True)
class TextCondition:
    """B prompts as their encoders' outputs.

    Attributes:
        tensors: by name, all with B as first dimension: "prompt_embeds" [B, L, D] and whatever else the family's
            networks are given with it, such as "pooled_prompt_embeds" [B, D] or "prompt_attention_mask" [B, L].
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if len({len(value) for value in self.tensors.values()}) != 1:
            shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
            raise ArgumentError(f"TextCondition: expected tensors with one and the same first dimension, got {shapes}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, index: Tensor | slice) -> TextCondition:
        """The prompts of an index [N] (on the same device) or a slice; one prompt can be taken many times."""
        return TextCondition({name: value[index] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TextCondition:
        """The same on another device."""
        return TextCondition(
            {name: value.to(device, non_blocking=non_blocking) for name, value in self.tensors.items()}
        )

    def repeated(self, count: int) -> TextCondition:
        """One prompt [1, ...] as `count` of them, without copying."""
        return TextCondition({name: value.expand(count, *value.shape[1:]) for name, value in self.tensors.items()})

    @staticmethod
    def concat(parts: Sequence[TextCondition]) -> TextCondition:
        """Prompts one after another; ArgumentError where parts are of different encoders or lengths."""
        names = parts[0].tensors.keys()
        try:
            if any(part.tensors.keys() != names for part in parts):
                raise RuntimeError(f"tensors {[sorted(part.tensors) for part in parts]}")
            return TextCondition({name: torch.cat([part.tensors[name] for part in parts]) for name in names})
        except RuntimeError as error:
            raise ArgumentError(
                f"TextCondition: prompts of different encoders cannot be joined ({str(error).splitlines()[0]}); encode "
                "all of them with one teacher's"
            ) from error


#: Labels int64 [B], or prompts.
Condition = Tensor | TextCondition


def concat(first: Condition, second: Condition) -> Condition:
    """Two batches of the same kind of condition as one."""
    if isinstance(first, TextCondition) and isinstance(second, TextCondition):
        return TextCondition.concat([first, second])
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    raise ArgumentError(f"condition: {type(first).__name__} and {type(second).__name__} cannot be joined")


def where(mask: Tensor, first: Condition, second: Condition) -> Condition:
    """Row by row `first` where mask [B] bool holds, else `second`."""
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
    """As many times what stands for no condition, a label or one prompt, as there are conditions."""
    if isinstance(condition, TextCondition):
        assert isinstance(none, TextCondition)
        return none.repeated(len(condition))
    assert isinstance(none, int)
    return torch.full_like(condition, none)


def as_labels(condition: Condition | None, num_classes: int | None) -> Tensor | None:
    """Labels [B], or None for a network without classes; ArgumentError where it is told something else."""
    if isinstance(condition, TextCondition):
        raise ArgumentError("condition: got prompts; this network knows class labels, or nothing")
    if condition is None and num_classes:
        raise ArgumentError(f"condition: this network wants class labels [B] in [0, {num_classes})")
    return condition


def upload_condition(condition: Condition, device: torch.device) -> Condition:
    """`upload` of labels, or of every tensor of prompts."""
    if isinstance(condition, TextCondition):
        return TextCondition({name: upload(value, device) for name, value in condition.tensors.items()})
    return upload(condition, device)
