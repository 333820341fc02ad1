"""Networks whose published checkpoints no library of ours can hold, under the names and shapes of those checkpoints."""

from __future__ import annotations

from fdistill.networks.edm import EDMNetwork
from fdistill.networks.edm2_unet import EDM2_CHANNELS, EDM2Network

__all__ = ["EDM2_CHANNELS", "EDM2Network", "EDMNetwork"]
