"""The autoencoder of a latent teacher: images to the samples that its denoiser sees, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fdistill.adapters import Checkpoint, resolve_checkpoint
from fdistill.adapters.pretrained import load_network
from fdistill.denoiser import Denoiser, LatentScaling
from fdistill.errors import CheckpointError
from fdistill.files import weights_sha256

_BATCH = 16  # images the autoencoder sees at once: its activations are far larger than a denoiser's


class LatentSpace:
    """A frozen autoencoder.

    It stays on the CPU and visits a device only while it is used there, so that it takes no memory from training.

    Attributes:
        scaling: from its latents to samples.
        factor: pixels for one latent, in each direction.
        sha256: hash of the autoencoder's weights.
    """

    def __init__(self, vae: AutoencoderKL, scaling: LatentScaling, sha256: str):
        self.vae = vae.eval().requires_grad_(False)
        self.scaling = scaling
        self.sha256 = sha256
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        try:
            self.vae.to(device)
            yield
        finally:
            self.vae.to("cpu")

    def facts(self) -> dict[str, Any]:
        """What cached latents have to agree with."""
        return {"vae": self.sha256, "latent_scale": list(self.scaling.scale), "latent_bias": list(self.scaling.bias)}

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Samples [B, C, h, w] -> images [B, 3, H, W], nominally in [-1, 1]."""
        with self._on(samples.device):
            return torch.cat([self.vae.decode(z).sample for z in self.scaling.to_latents(samples).split(_BATCH)])

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents z, [B, 2C, h, w]."""
        parts = []
        with self._on(images.device):
            for part in images.split(_BATCH):
                posterior = self.vae.encode(part).latent_dist
                parts.append(torch.cat([posterior.mean, posterior.std], dim=1))
        return torch.cat(parts)


def attach_latent_space(denoiser: Denoiser, checkpoint: Checkpoint, vae: str | None) -> LatentSpace | None:
    """The autoencoder in a checkpoint's vae/, or in the folder or hub id `vae`; None for a denoiser of pixels.

    The denoiser's `latent_scaling` becomes the autoencoder's own where the checkpoint says nothing else.

    Raises:
        CheckpointError: latents without an autoencoder, or one of another number of channels.
    """
    folder = (checkpoint.folder or Path()) / "vae"
    if vae is not None:
        given = resolve_checkpoint(vae).folder
        if given is None:
            raise CheckpointError(f"vae {vae!r}: is a function; expected a folder or hub id of an AutoencoderKL")
        folder = given / "vae" if (given / "vae").is_dir() else given
    channels = denoiser.sample_shape[0]
    if vae is None and (checkpoint.folder is None or not folder.is_dir()):
        # A component that a pipeline could have and has not is listed as [null, null].
        listed = any((checkpoint.index.get(part) or [None])[0] for part in ("vae", "vqvae"))
        if denoiser.latent_scaling is None and channels in (1, 3) and not listed:
            return None
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: its samples have {channels} channels, latents of an autoencoder that is "
            "not in the folder; copy it into vae/, or pass vae=FOLDER (usually stabilityai/sd-vae-ft-mse)"
        )
    model = load_network(AutoencoderKL, folder)
    if model.config.latent_channels != channels:
        raise CheckpointError(
            f"vae {folder}: has latents of {model.config.latent_channels} channels, but checkpoint {checkpoint.name!r} "
            f"samples of {channels}; expected the autoencoder it was trained with"
        )
    if denoiser.latent_scaling is None:
        scale = float(model.config.scaling_factor)
        shift = float(getattr(model.config, "shift_factor", None) or 0.0)
        denoiser.latent_scaling = LatentScaling((scale,) * channels, (-scale * shift,) * channels)
    return LatentSpace(model, denoiser.latent_scaling, weights_sha256(folder))
