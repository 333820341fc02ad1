"""Images that a protocol knows the right answers of, because they were made from its own prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from evaluation.metrics.metric import Measured
from fdistill.base.errors import ArgumentError


class Prompt(Protocol):
    """A caption whose answer is known."""

    @property
    def text(self) -> str:
        """What the model is told."""


P = TypeVar("P", bound=Prompt)


def prompts_of(measured: Measured, protocol: str, listed: Sequence[P]) -> list[P]:
    """The protocol's prompt of each image, in turn.

    Args:
        protocol: its name, for the message.
        listed: its prompts, in their order.

    Raises:
        ArgumentError: the images were generated from other prompts.
    """
    images = measured.images
    expected = [listed[i % len(listed)] for i in range(len(images))]
    if images.prompts is None or list(images.prompts) != [prompt.text for prompt in expected]:
        raise ArgumentError(
            f"{images.name}: its images were not generated from the prompts of protocol {protocol!r} in their order; "
            f"evaluate the student or teacher itself (fdistill evaluate CHECKPOINT --protocol {protocol}), which makes "
            "them from these prompts"
        )
    return expected
