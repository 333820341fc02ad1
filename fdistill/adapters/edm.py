"""EDM networks (DDPM++, NCSN++, ADM of Karras et al. 2022) as denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fdistill.adapters.config_fields import check_network
from fdistill.adapters.family import Family
from fdistill.adapters.parametrisation import EDMPreconditioning
from fdistill.adapters.variances import without_dropout
from fdistill.condition import Condition, as_labels
from fdistill.denoiser import Denoiser, Features
from fdistill.networks import EDM2Network, EDMNetwork
from fdistill.networks.skeleton import UNet
from fdistill.noise import EDMSchedule
from fdistill.prediction import Preconditioning


class EDMDenoiser(Denoiser):
    """An EDMNetwork with its preconditioning.

    Features: "enc32", "enc16", ..., the outputs of the last encoder block of each resolution, and "mid", that of the
    middle block. Augmentation labels are zeros, as in published sampling.

    Attributes:
        network: the EDMNetwork.
        parametrisation: its EDM preconditioning.
        null_class: the label of "no class", num_classes; None if the network was not trained without labels.
    """

    parametrisation: EDMPreconditioning

    def __init__(self, network: EDMNetwork | EDM2Network):
        super().__init__()
        check_network(network)
        config = network.config
        self.network = network
        self.parametrisation = EDMPreconditioning(
            EDMSchedule(config.sigma_min, config.sigma_max), config.sigma_data, boundary=0.0, time_scale=0.25
        )
        self.schedule = self.parametrisation.schedule
        self.sigma_data = self.parametrisation.sigma_data
        self.kind = self.parametrisation.kind
        self.loss_weighting = self.parametrisation.loss_weighting
        self.sample_shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self.num_classes = config.label_dim or None
        self.null_class = self.num_classes if config.label_dropout else None
        self.feature_shapes = dict(self._unet().feature_shapes)

    def with_network(self, network: EDMNetwork | EDM2Network) -> EDMDenoiser:
        """A denoiser of another network of this class, with the same parametrisation."""
        return type(self)(network)

    def _unet(self) -> UNet:
        unet: UNet = self.network.model
        return unet

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.parametrisation.preconditioning(t)

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Condition | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        unet = self._unet()
        rows = self._class_rows(as_labels(condition, self.num_classes), network_input.dtype)
        embedding = unet.embed(self.parametrisation.timestep(t), rows, None, network_input.dtype)
        hidden, skips, tapped = unet.encode(network_input, embedding, features)
        if output or "mid" in features:
            with nullcontext() if output_grad or "mid" in features else torch.no_grad():
                hidden = unet.middle(hidden, embedding)
        if "mid" in features:
            tapped["mid"] = hidden
        if not output:
            return None, tapped
        with nullcontext() if output_grad else torch.no_grad():
            return unet.decode(hidden, skips, embedding), tapped

    def _class_rows(self, labels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Labels [B] as one-hot rows [B, label_dim]; a label outside [0, label_dim) is a row of zeros."""
        if self.num_classes is None or labels is None:
            return None
        return (labels[:, None] == torch.arange(self.network.config.label_dim, device=labels.device)).to(dtype)


def wrap(network: EDMNetwork, scheduler: Mapping[str, Any] | None) -> EDMDenoiser:
    """Builds the denoiser from a network. The network's own config gives the schedule, so `scheduler` is ignored."""
    return EDMDenoiser(without_dropout(network))


FAMILY = Family(EDMNetwork, wrap)
