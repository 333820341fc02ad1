"""Networks of published checkpoints for which diffusers has no class, with the checkpoints' tensor names and shapes."""

from __future__ import annotations

from fdistill.networks.edm import EDMNetwork
from fdistill.networks.edm2_unet import EDM2_CHANNELS, EDM2Network

__all__ = ["EDM2_CHANNELS", "EDM2Network", "EDMNetwork"]
