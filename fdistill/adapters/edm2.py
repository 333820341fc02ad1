"""EDM2 networks (Karras et al. 2023), on pixels or latents, as denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdistill.adapters.edm import EDMDenoiser
from fdistill.adapters.family import Family
from fdistill.adapters.variances import without_dropout
from fdistill.denoiser import LatentScaling
from fdistill.networks import EDM2Network
from fdistill.networks.skeleton import UNet


class EDM2Denoiser(EDMDenoiser):
    """An EDM2Network with its preconditioning, which is EDM's; features and attributes as in `EDMDenoiser`."""

    network: EDM2Network

    def __init__(self, network: EDM2Network):
        super().__init__(network)
        latent = network.config.latent_scale is not None
        self.latent_scaling = LatentScaling.from_settings(network.config) if latent else None

    def _unet(self) -> UNet:
        return self.network.unet

    def after_update(self) -> None:
        """Normalises the weights after every update, as EDM2's training does (forced weight normalisation)."""
        self.network.normalize_weights_()


def wrap(network: EDM2Network, scheduler: Mapping[str, Any] | None) -> EDM2Denoiser:
    """Builds the denoiser from a network. The network's own config gives the schedule, so `scheduler` is ignored."""
    return EDM2Denoiser(without_dropout(network))


FAMILY = Family(EDM2Network, wrap)
