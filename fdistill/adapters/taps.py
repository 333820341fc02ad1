"""Reads features of a network with forward hooks, and ends its forward early if nothing more is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdistill.denoiser import Features

__all__ = ["run_tapped"]


class _NothingMoreIsWanted(Exception):
    """Raised by the last hook to leave the network's forward."""


def run_tapped(
    call: Callable[[], Tensor],
    modules: Mapping[str, nn.Module],
    read: Callable[[str, Any], Tensor],
    features: Sequence[str],
    *,
    output: bool,
    output_grad: bool,
) -> tuple[Tensor | None, Features]:
    """Returns what `Denoiser.run` returns, for a network whose forward is another library's code.

    Args:
        call: evaluates the network.
        modules: name of a feature -> the module whose output it is.
        read: turns a feature's name and its module's output into the feature [B, C, H, W].
        features: names in `modules`; each of these modules must run once in `call`.
        output: False ends the forward at the last feature.
        output_grad: False runs everything after the last feature without autograd.
    """
    tapped: Features = {}
    wanted = set(features)
    grad = torch.is_grad_enabled()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def tap(_module: nn.Module, _inputs: Any, result: Any) -> None:
            if name in tapped:  # activation checkpointing runs the module again for its gradient
                return
            tapped[name] = read(name, result)
            if len(tapped) == len(wanted):
                if not output:
                    raise _NothingMoreIsWanted
                if not output_grad:
                    torch.set_grad_enabled(False)

        return tap

    handles = [modules[name].register_forward_hook(hook(name)) for name in sorted(wanted)]
    try:
        if not wanted and not output_grad:
            torch.set_grad_enabled(False)
        return (call() if output or wanted else None), tapped
    except _NothingMoreIsWanted:
        return None, tapped
    finally:
        torch.set_grad_enabled(grad)
        for handle in handles:
            handle.remove()
