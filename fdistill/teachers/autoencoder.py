"""The autoencoder of a latent teacher: images to the samples that its denoiser sees, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderDC, ModelMixin
from einops import rearrange
from torch import Tensor

from fdistill.adapters.checkpoint import Checkpoint, resolve_checkpoint
from fdistill.adapters.config_fields import AUTOENCODER_FIELDS, check_fields, constructor_defaults
from fdistill.adapters.pretrained import load_network
from fdistill.base.errors import CheckpointError, did_you_mean
from fdistill.base.files import read_json_object, weights_sha256
from fdistill.denoiser import Denoiser, LatentScaling
from fdistill.kernels.checks import wide

_PIXELS = 2**21  # of the images an autoencoder sees at once: its activations are far larger than a denoiser's

_VIDEO = "AutoencoderKLQwenImage"  # from diffusers 0.35 on; takes images as videos of one frame
_PATCHED = "AutoencoderKLFlux2"  # from diffusers 0.36 on; its pipelines cut its latents into patches
_PATCH = 2  # side of these patches, whatever the config's patch_size says
#: Supported classes of autoencoders.
AUTOENCODERS = tuple(name for name in ("AutoencoderKL", "AutoencoderDC", _VIDEO, _PATCHED) if hasattr(diffusers, name))


class LatentSpace:
    """A frozen autoencoder, between a latent teacher's samples and images.

    It stays on the CPU, and is on a device only while it is used there, so that it takes no memory from training.
    Latents of FLUX.2 are what its networks see: patches of 2 x 2 of what the autoencoder returns, so they have four
    times as many channels and half the height and width.

    Attributes:
        vae: one of `AUTOENCODERS`.
        scaling: from its latents to samples.
        factor: how many times longer the side of an image is than that of its latents.
        sha256: hash of the autoencoder's weights.
    """

    def __init__(self, vae: ModelMixin, scaling: LatentScaling, sha256: str):
        self.vae: Any = vae.eval().requires_grad_(False)
        self.scaling = scaling
        self.sha256 = sha256
        self.factor = pixels_per_latent(vae)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        try:
            self.vae.to(device)
            yield
        finally:
            self.vae.to("cpu")

    def facts(self) -> dict[str, Any]:
        """Facts that `fdistill cache` stores with latents; a run refuses latents whose facts differ from its
        teacher's.
        """
        return {"vae": self.sha256, **self.scaling.settings()}

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Samples [B, C, h, w] -> images [B, 3, H, W], nominally in [-1, 1]; without gradient, a few at a time."""
        parts = samples.split(_at_once(self.factor**2 * samples[0, 0].numel()))
        with self._on(samples.device):
            return torch.cat([decode_samples(self.vae, self.scaling, part) for part in parts])

    def decode_with_gradient(self, samples: Tensor) -> Tensor:
        """As `decode`, differentiable in the samples, all at once; the autoencoder stays on their device."""
        self.vae.to(samples.device)
        return decode_samples(self.vae, self.scaling, samples)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents z, [B, 2C, h, w]; the latter
        is 0 for an autoencoder without a posterior.
        """
        with self._on(images.device):
            return torch.cat([self._encode(part) for part in images.split(_at_once(images[0, 0].numel()))])

    def _encode(self, images: Tensor) -> Tensor:
        images = self.scaling.to_pixels(images)
        if _has_no_posterior(self.vae):
            z: Tensor = self.vae.encode(images).latent
            return torch.cat([z, torch.zeros_like(z)], dim=1)
        if _is_video(self.vae):
            posterior = self.vae.encode(images[:, :, None]).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1)[:, :, 0]
        posterior = self.vae.encode(images).latent_dist
        moments = (posterior.mean, posterior.std)
        return torch.cat([_patches(part) for part in moments] if _is_patched(self.vae) else moments, dim=1)


def decode_samples(vae: Any, scaling: LatentScaling, samples: Tensor) -> Tensor:
    """Samples [B, C, h, w] -> images [B, 3, H, W], nominally in [-1, 1], on the autoencoder's device and in its dtype.

    Args:
        vae: of one of the classes of `AUTOENCODERS`.
    """
    z = scaling.to_latents(samples).to(vae.dtype)
    if _is_patched(vae):
        z = rearrange(z, "b (c p q) h w -> b c (h p) (w q)", p=_PATCH, q=_PATCH)
    pixels = vae.decode(z[:, :, None]).sample[:, :, 0] if _is_video(vae) else vae.decode(z).sample
    return scaling.to_images(pixels)


def _patches(z: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H / 2, W / 2], in the order of the pipelines of FLUX.2."""
    return rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=_PATCH, q=_PATCH)


def unit_images(samples: Tensor, latents: LatentSpace | None) -> Tensor:
    """Samples [B, C, h, w] -> RGB images [B, 3, H, W] clamped to [0, 1], in float32 at least, differentiable.

    Args:
        latents: decodes the samples; None if they are images in [-1, 1], of one channel or three.
    """
    samples = samples.to(wide(samples.dtype))
    decoded = samples if latents is None else latents.decode_with_gradient(samples)
    return (decoded.to(wide(decoded.dtype)) / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)


def pixels_per_latent(vae: Any) -> int:
    """How many times longer the side of an image is than that of its latents."""
    config = vae.config
    if _is_video(vae):
        return int(2 ** len(config.temperal_downsample))
    levels = config.encoder_block_out_channels if _has_no_posterior(vae) else config.block_out_channels
    return int(2 ** (len(levels) - 1)) * (_PATCH if _is_patched(vae) else 1)


def image_size(denoiser: Denoiser, latents: LatentSpace | None) -> int:
    """Side in pixels of the images, after decoding if samples are latents."""
    return denoiser.sample_shape[-1] * (1 if latents is None else latents.factor)


def image_shape(denoiser: Denoiser, latents: LatentSpace | None) -> tuple[int, int, int]:
    """(C, H, W) of the images that a denoiser's samples are, or are decoded to."""
    size = image_size(denoiser, latents)
    return (denoiser.sample_shape[0] if latents is None else 3), size, size


def _at_once(pixels: int) -> int:
    """How many images of so many pixels the autoencoder sees at once."""
    return max(1, _PIXELS // pixels)


def _is_video(vae: ModelMixin) -> bool:
    return type(vae).__name__ == _VIDEO


def _is_patched(vae: ModelMixin) -> bool:
    return type(vae).__name__ == _PATCHED


def _has_no_posterior(vae: ModelMixin) -> bool:
    return isinstance(vae, AutoencoderDC)


#: Pipeline class of diffusers -> what it reads of an autoencoder's config beside scaling_factor.
_READ: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": (),
    "StableDiffusionXLPipeline": ("latents_mean", "latents_std"),
    "StableDiffusion3Pipeline": ("shift_factor",),
    "FluxPipeline": ("shift_factor",),
    "ZImagePipeline": ("shift_factor",),
    "Lumina2Pipeline": ("shift_factor",),
    "PixArtAlphaPipeline": (),
    "PixArtSigmaPipeline": (),
    "SanaPipeline": (),
    "DiTPipeline": (),
}
_STATISTICS = ("shift_factor", "latents_mean", "latents_std")


def _own_scaling(vae: ModelMixin, pipeline: str | None) -> LatentScaling:
    """The autoencoder's own scaling, with which networks on its latents are trained.

    It is sample = scaling_factor (z - shift_factor), or scaling_factor (z - latents_mean) / latents_std, with numbers
    from the config. FLUX.2's autoencoder has mean and variance among its weights, as the statistics of a batch norm.

    Args:
        vae: of one of the classes of `AUTOENCODERS`.
        pipeline: the class of the pipeline that it is used in; None if there is none.

    Raises:
        CheckpointError: the config has a statistic that this pipeline does not read, or statistics that do not go
            together.
    """
    config: Any = vae.config
    name = type(vae).__name__
    if _is_video(vae):
        return _by_statistics(name, 1.0, config.latents_mean, config.latents_std, config.z_dim)
    if _is_patched(vae):
        norm: Any = vae.bn
        scale = (norm.running_var.double() + config.batch_norm_eps).rsqrt()
        return LatentScaling(tuple(scale.tolist()), tuple((-norm.running_mean * scale).tolist()))
    given = {key: getattr(config, key, None) for key in _STATISTICS}
    given = {key: value for key, value in given.items() if value not in (None, 0)}
    unread = [key for key in given if key not in _READ.get(str(pipeline), _STATISTICS)]
    if unread:
        raise CheckpointError(
            f"{name} with {unread[0]} {given[unread[0]]!r}: {pipeline} does not read it, so that a student would be "
            "trained on other latents than it is decoded from; expected null"
        )
    scale, channels = float(config.scaling_factor), config.latent_channels
    if given.keys() in ({"latents_mean"}, {"latents_std"}) or len(given) == len(_STATISTICS):
        raise CheckpointError(
            f"{name} with {', '.join(given)}: expected latents_mean and latents_std, or shift_factor, or none of them"
        )
    if "latents_std" in given:
        return _by_statistics(name, scale, given["latents_mean"], given["latents_std"], channels)
    shift = float(given.get("shift_factor") or 0)
    return LatentScaling((scale,) * channels, (-scale * shift,) * channels)


def _by_statistics(name: str, scale: float, means: Any, stds: Any, channels: int) -> LatentScaling:
    try:
        pairs = [(float(mean), float(std)) for mean, std in zip(means, stds, strict=True)]
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) != channels or not all(std > 0 for _, std in pairs):
        raise CheckpointError(
            f"{name} with latents_mean {means!r} and latents_std {stds!r}: expected {channels} numbers each, the "
            "latter above 0"
        )
    return LatentScaling(tuple(scale / std for _, std in pairs), tuple(-mean * scale / std for mean, std in pairs))


def _load_autoencoder(folder: Path) -> ModelMixin:
    """The autoencoder of a folder.

    Raises:
        CheckpointError: its class is not among `AUTOENCODERS`, its config holds a field that is refused or unknown, or
            files do not fit it.
    """
    path = folder / "config.json"
    try:
        config = read_json_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected the config of an autoencoder") from error
    name = str(config.get("_class_name"))
    if name not in AUTOENCODERS:
        raise CheckpointError(
            f"{path}: autoencoder class {name!r} is not supported; {did_you_mean(name, AUTOENCODERS)}"
        )
    cls = getattr(diffusers, name)
    check_fields(f"{path}: {name}", AUTOENCODER_FIELDS[name], config, constructor_defaults(cls))
    vae: ModelMixin = load_network(cls, folder)
    return vae


def attach_latent_space(denoiser: Denoiser, checkpoint: Checkpoint, vae: str | None) -> LatentSpace | None:
    """The autoencoder in a checkpoint's vae/, or in the folder or hub id `vae`; None for a denoiser of pixels.

    The denoiser's `latent_scaling` becomes the autoencoder's own, unless the checkpoint has set another.

    Raises:
        CheckpointError: the denoiser sees latents, but there is no autoencoder, or one with other channels, or one
            whose config says what its pipeline does not read.
    """
    folder = (checkpoint.folder or Path()) / "vae"
    if vae is not None:
        given = resolve_checkpoint(vae).folder
        if given is None:
            raise CheckpointError(f"vae {vae!r}: is a function; expected a folder or hub id of an autoencoder")
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
    model = _load_autoencoder(folder)
    try:
        scaling = _own_scaling(model, checkpoint.index.get("_class_name"))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    if len(scaling.scale) != channels:
        raise CheckpointError(
            f"vae {folder}: has latents of {len(scaling.scale)} channels, but checkpoint {checkpoint.name!r} samples "
            f"of {channels}; expected the autoencoder it was trained with"
        )
    if denoiser.latent_scaling is None:
        denoiser.latent_scaling = scaling
    return LatentSpace(model, denoiser.latent_scaling, weights_sha256(folder))
