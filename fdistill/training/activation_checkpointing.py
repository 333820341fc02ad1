"""Activation checkpointing (arXiv 1604.06174) by torch and diffusers: backward recomputes activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fdistill.base.devices import products_as_now
from fdistill.base.errors import ConfigError
from fdistill.denoiser import Denoiser


def checkpoint_activations(denoiser: Denoiser) -> None:
    """Makes a network keep only the activations between its blocks.

    Raises:
        ConfigError: the network does not support activation checkpointing.
    """
    network = denoiser.network
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing: {type(denoiser if network is None else network).__name__} does not support it; "
            "expected false, or a network of diffusers or of fdistill"
        )

    def recomputed(block: Callable[..., Any], *arguments: Any) -> Any:
        owner = block if isinstance(block, nn.Module) else network
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: _contexts(owner))

    network.enable_gradient_checkpointing(gradient_checkpointing_func=recomputed)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for a block's first run and for its recomputation, which restores the settings of the first run.

    The settings may have changed by then: a step freezes some networks only while it evaluates them, not during
    backward; and R1 selects attention that can be differentiated twice only while it evaluates the network.
    """
    return nullcontext(), _AsItWas(module)


class _AsItWas(AbstractContextManager[None]):
    """Restores which parameters require gradients, which attention backends are enabled and how products are computed,
    as at construction.

    It can be entered several times, as a second backward through the same block does.
    """

    def __init__(self, module: nn.Module):
        self._module = module  # and not its parameters: others take their place while a sharded block is gathered
        self._flags = [parameter.requires_grad for parameter in module.parameters()]
        self._attention = [backend for backend, enabled in _BACKENDS.items() if enabled()]
        self._products = products_as_now()
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        self._open.append(stack)
        stack.enter_context(sdpa_kernel(self._attention))
        stack.enter_context(self._products())
        stack.callback(self._set, [parameter.requires_grad for parameter in self._module.parameters()])
        self._set(self._flags)

    def __exit__(self, *error: object) -> None:
        self._open.pop().close()

    def _set(self, flags: Sequence[bool]) -> None:
        for parameter, flag in zip(self._module.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


_BACKENDS: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
