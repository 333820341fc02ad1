"""Activations that are computed again for the gradient, not kept (arXiv 1604.06174), by torch and diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from fdistill.denoiser import Denoiser
from fdistill.errors import ConfigError


def checkpoint_activations(denoiser: Denoiser) -> None:
    """Makes a network of diffusers keep no activations but those between its blocks.

    Raises:
        ConfigError: a network that cannot.
    """
    network: Any = getattr(denoiser, "network", None)
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing: {type(denoiser if network is None else network).__name__} cannot; expected "
            "false, or a network of diffusers that supports it"
        )
    parameters = list(network.parameters())

    def recomputed(block: Callable[..., Any], *arguments: Any) -> Any:
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: _contexts(parameters))

    network.enable_gradient_checkpointing(gradient_checkpointing_func=recomputed)


def _contexts(parameters: Sequence[Parameter]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a block, and around it again: then its parameters are trained or not as they were the first time.

    A step treats some networks as constants while it evaluates them, and no longer when it calls backward.
    """
    return nullcontext(), _as_they_are_now(parameters, [parameter.requires_grad for parameter in parameters])


@contextmanager
def _as_they_are_now(parameters: Sequence[Parameter], flags: Sequence[bool]) -> Iterator[None]:
    later = [parameter.requires_grad for parameter in parameters]
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, later, strict=True):
            parameter.requires_grad_(flag)
