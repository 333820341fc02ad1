"""Activations that are computed again for the gradient, not kept (arXiv 1604.06174), by torch and diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fdistill.base.errors import ConfigError
from fdistill.denoiser import Denoiser


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
    """Around a block, and around it again: what it runs under is then as it was the first time.

    A step treats some networks as constants while it evaluates them, and no longer when it calls backward; and R1 asks
    for attention that can be differentiated twice while it evaluates.
    """
    return nullcontext(), _AsItWas(parameters)


class _AsItWas(AbstractContextManager[None]):
    """Which parameters are trained, and how attention is computed, as when this was made. It can be entered again, as a
    second backward through the same block does.
    """

    def __init__(self, parameters: Sequence[Parameter]):
        self._parameters = parameters
        self._flags = [parameter.requires_grad for parameter in parameters]
        self._attention = [backend for backend, enabled in _BACKENDS.items() if enabled()]
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        self._open.append(stack)
        stack.enter_context(sdpa_kernel(self._attention))
        stack.callback(self._set, [parameter.requires_grad for parameter in self._parameters])
        self._set(self._flags)

    def __exit__(self, *error: object) -> None:
        self._open.pop().close()

    def _set(self, flags: Sequence[bool]) -> None:
        for parameter, flag in zip(self._parameters, flags, strict=True):
            parameter.requires_grad_(flag)


_BACKENDS: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
