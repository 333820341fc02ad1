"""EDM networks (Karras et al. 2022, arXiv 2206.00364) stored as config.json and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.networks.dhariwal_unet import DhariwalUNet
from fdistill.networks.skeleton import UNet
from fdistill.networks.song_unet import SongUNet

_CLASSES: dict[str, Callable[..., UNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class EDMNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The raw network F of an EDM checkpoint as `model`; tensors have the published names, shapes and order.

    Args:
        model_type: "SongUNet" (DDPM++, NCSN++) or "DhariwalUNet" (ADM).
        label_dim: number of classes; 0 for an unconditional network.
        sigma_min: least noisy level; published checkpoints hold 0, but were sampled down to 0.002.
        sigma_max: noisiest level; published checkpoints hold infinity, but were sampled from 80.
        sigma_data: standard deviation of the data, for the preconditioning.
        augment_dim: number of augmentation labels that the network was trained with, or 0.
        label_dropout: probability with which training replaced a label by zeros; None means never. forward never does.
        decoder_type: "standard", as in every published checkpoint.

    The others are the settings of `SongUNet` and `DhariwalUNet`. None means the network's default, and is the only
    value allowed for a setting that the network does not have.

    Raises:
        ArgumentError: model_type or decoder_type is unknown, or the network does not have a setting that is given.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        model_type: str,
        img_resolution: int,
        img_channels: int = 3,
        label_dim: int = 0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        augment_dim: int = 0,
        model_channels: int | None = None,
        channel_mult: Sequence[int] | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int | None = None,
        attn_resolutions: Sequence[int] | None = None,
        dropout: float | None = None,
        label_dropout: float | None = None,
        embedding_type: str | None = None,
        channel_mult_noise: int | None = None,
        encoder_type: str | None = None,
        decoder_type: str | None = None,
        resample_filter: Sequence[float] | None = None,
    ):
        super().__init__()
        if model_type not in _CLASSES:
            raise ArgumentError(f"model_type: got {model_type!r}; {did_you_mean(model_type, _CLASSES)}")
        if decoder_type not in (None, "standard"):
            raise ArgumentError(f"decoder_type: got {decoder_type!r}; expected 'standard', the published one")
        settings = {
            "model_channels": model_channels,
            "channel_mult": channel_mult,
            "channel_mult_emb": channel_mult_emb,
            "num_blocks": num_blocks,
            "attn_resolutions": attn_resolutions,
            "dropout": dropout,
        }
        of_song_unet = {
            "embedding_type": embedding_type,
            "channel_mult_noise": channel_mult_noise,
            "encoder_type": encoder_type,
            "resample_filter": resample_filter,
        }
        given = {name: value for name, value in (settings | of_song_unet).items() if value is not None}
        foreign = sorted(given.keys() & of_song_unet.keys()) if model_type != "SongUNet" else []
        if foreign:
            raise ArgumentError(f"{foreign[0]}: {model_type} has no such setting; expected null")
        self.model = _CLASSES[model_type](img_resolution, img_channels, label_dim, augment_dim, **given)

    def forward(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The raw output F. x [B, C, H, W] = c_in x_t, c_noise [B] = ln(sigma) / 4, class_labels [B, label_dim] one-hot
        rows (a row of zeros: no class), augment_labels [B, augment_dim]; None means zeros. -> [B, C, H, W].
        """
        output: Tensor = self.model(x, c_noise, class_labels, augment_labels)
        return output
