"""Makes a denoiser of a network with the same class but another config, such as fewer blocks or channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin

from fdistill.adapters import set_null_class
from fdistill.base.errors import CheckpointError, ConfigError, did_you_mean
from fdistill.denoiser import Denoiser


class Resized(NamedTuple):
    """A changed denoiser, the names of its parameters that were copied, and the names of those that start at random."""

    denoiser: Denoiser
    copied: list[str]
    new: list[str]


#: Settings that say what the weights mean; they cannot be changed.
_NOT_ARCHITECTURE = {"sigma_data", "sigma_min", "sigma_max", "label_dropout"} | {
    "latent_scale",
    "latent_bias",
    "pixel_range",
}


@torch.no_grad()
def _try(denoiser: Denoiser) -> None:
    """Runs the network once, because some settings that do not fit one another fail only then."""
    t = torch.full((1,), denoiser.schedule.t_max)
    denoiser.eval()(torch.zeros(1, *denoiser.sample_shape), t, denoiser.example_condition(1, "cpu"))


def resized(denoiser: Denoiser, changes: Mapping[str, Any]) -> Resized:
    """A denoiser whose network's config differs in `changes`; tensors of equal name and shape are copied.

    Raises:
        ConfigError: the network's config has no such key, no network can be built with these settings, or the new
            network makes samples of another shape or takes other classes or prompts.
    """
    network = denoiser.network
    if not isinstance(network, ConfigMixin):
        raise ConfigError(
            "student.network: the network comes from a function and has no config; expected a function that returns a "
            "smaller network, as student.checkpoint=module:function"
        )
    known = {key for key in network.config if not key.startswith("_")} - _NOT_ARCHITECTURE
    for key in changes:
        if key not in known:
            raise ConfigError(
                f"student.network.{key}: {type(network).__name__} has no such setting; {did_you_mean(key, known)}"
            )
    try:
        # Without diffusers' note of what had its default when the network was made: it would undo changes of that.
        config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
        other = type(network).from_config({**config, **changes})
        smaller = denoiser.with_network(other)
        if denoiser.null_class is not None:
            set_null_class(smaller, denoiser.null_class)
        smaller.latent_scaling = denoiser.latent_scaling
        _try(smaller)
    except (CheckpointError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise ConfigError(
            f"student.network: {type(network).__name__} cannot be built with {dict(changes)} ({error}); expected "
            "settings that fit one another"
        ) from error
    if smaller.sample_shape != denoiser.sample_shape or smaller.num_classes != denoiser.num_classes:
        raise ConfigError(
            f"student.network: makes samples {smaller.sample_shape} of {smaller.num_classes} classes, the network it "
            f"starts from {denoiser.sample_shape} of {denoiser.num_classes}; expected the same of both"
        )
    if smaller.text_shapes != denoiser.text_shapes:
        raise ConfigError(
            f"student.network: takes prompts as {smaller.text_shapes}, the network it starts from as "
            f"{denoiser.text_shapes}; expected the same of both, as one text encoder serves both"
        )
    weights, into = network.state_dict(), other.state_dict()
    copied = [name for name, value in into.items() if name in weights and weights[name].shape == value.shape]
    with torch.no_grad():
        for name in copied:
            into[name].copy_(weights[name])
    return Resized(smaller.eval(), copied, [name for name in into if name not in set(copied)])
