"""Removes what makes a prediction more than a function of its inputs, or more than a prediction: dropout, and learned
variances (Nichol & Dhariwal 2021, arXiv 2102.09672), which only an ancestral sampler uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fdistill.base.errors import CheckpointError


def without_dropout(network: Any) -> Any:
    """Sets all dropout of a network to 0, in place, so that a sample depends on its noise alone, in training mode too.

    Returns:
        The network.
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if "dropout" in network.config:
        network.register_to_config(dropout=0.0)
    return network


def without_variances(network: Any, last: str) -> None:
    """Cuts the outputs of a network of diffusers, in place, to as many channels as it has inputs.

    Args:
        network: a network whose config has in_channels and out_channels.
        last: name of its last layer: a convolution, or a linear layer whose rows are the output channels of the first
            pixel of a patch, then those of the next, and so on.

    Raises:
        CheckpointError: the network has neither as many output as input channels nor twice as many.
    """
    inputs, outputs = network.config.in_channels, network.config.out_channels
    if outputs in (None, inputs):
        return
    if outputs != 2 * inputs:
        raise CheckpointError(
            f"{type(network).__name__} with {inputs} input and {outputs} output channels: expected as many outputs as "
            "inputs, or twice as many where variances are learned"
        )
    setattr(network, last, _means(getattr(network, last), inputs))
    network.register_to_config(out_channels=inputs)
    network.out_channels = inputs  # read by the forward of transformers


@torch.no_grad()
def _means(layer: nn.Linear | nn.Conv2d, channels: int) -> nn.Linear | nn.Conv2d:
    """A copy of the layer with only the first `channels` of every 2 * `channels` outputs."""
    options: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    kept: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Conv2d):
        kept = nn.Conv2d(layer.in_channels, channels, layer.kernel_size, padding=layer.padding, **options)  # type: ignore[arg-type]
    else:
        kept = nn.Linear(layer.in_features, layer.out_features // 2, **options)
    for name, value in layer.state_dict().items():
        both = value.unflatten(0, (-1, 2 * channels))
        kept.get_parameter(name).copy_(both[:, :channels].flatten(0, 1))
    return kept


def with_variances(tensors: Mapping[str, Tensor], last: str, channels: int) -> dict[str, Tensor]:
    """The tensors of a network, or of adapters, for the whole network that `without_variances` has cut.

    Args:
        tensors: by name. The last layer's are weight, bias and lora_B.weight.
        last: the last layer's path, with whatever precedes it in the names.
        channels: the network's output channels, which are all means.

    Returns:
        The same tensors, where the last layer's have zeros as the rows of the variances.
    """
    made = dict(tensors)
    for name in (f"{last}.weight", f"{last}.bias", f"{last}.lora_B.weight"):
        if name in made:
            means = made[name].unflatten(0, (-1, channels))
            made[name] = torch.cat([means, torch.zeros_like(means)], dim=1).flatten(0, 1)
    return made
