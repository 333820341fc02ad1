"""The magnitude-preserving network of EDM2 (Karras et al. 2023, arXiv 2312.02696, configuration G, appendix B)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fdistill.base.devices import without_autocast
from fdistill.base.errors import ArgumentError
from fdistill.networks.edm2_layers import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, unit_rms
from fdistill.networks.skeleton import Levels, Resampling, UNet, build_decoder, build_encoder

#: model_channels of the published sizes (arXiv 2312.02696, table 2).
EDM2_CHANNELS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


class MPBlock(nn.Module):
    """A residual block of the encoder, which first normalises each pixel, or of the decoder."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        of_encoder: bool,
        resampling: Resampling | None,
        heads: int,
        dropout: float,
        res_balance: float,
        attn_balance: float,
        clip_act: float | None,
    ):
        super().__init__()
        self.of_encoder, self.resampling, self.heads = of_encoder, resampling, heads
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.dropout = nn.Dropout(dropout)
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if of_encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        if heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.resampling == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resampling == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.of_encoder:
            x = unit_rms(x if self.conv_skip is None else self.conv_skip(x), (1,))

        with without_autocast(x.device):
            scale = self.emb_linear(embedding, self.emb_gain) + 1
        hidden = self.conv_res0(mp_silu(x))
        hidden = mp_silu(hidden * scale[:, :, None, None].to(hidden.dtype))
        hidden = self.conv_res1(self.dropout(hidden))

        if not self.of_encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, hidden, self.res_balance)
        if self.heads:
            x = mp_sum(x, self.attn_proj(self._attention(x)), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)

    def _attention(self, x: Tensor) -> Tensor:
        # A head's channels hold (q, k, v) side by side for every one of its dimensions.
        qkv = self.attn_qkv(x).reshape(len(x), self.heads, x.shape[1] // self.heads, 3, -1)
        # Fused attention wants the dimensions of a head side by side; otherwise torch multiplies whole matrices.
        q, k, v = unit_rms(qkv, (2,)).permute(3, 0, 1, 4, 2).contiguous().unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)


class EDM2UNet(UNet):
    """The network inside `EDM2Network`; the arguments mean the same there."""

    def __init__(
        self,
        levels: Levels,
        img_channels: int,
        label_dim: int,
        noise_channels: int,
        emb_channels: int,
        *,
        label_balance: float,
        concat_balance: float,
        channels_per_head: int,
        dropout: float,
        res_balance: float,
        attn_balance: float,
        clip_act: float | None,
    ):
        super().__init__(levels)
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None

        def block(
            of_encoder: bool, inputs: int, outputs: int, resampling: Resampling | None, attention: bool
        ) -> MPBlock:
            if attention and outputs % channels_per_head:
                raise ArgumentError(
                    f"attention at {outputs} channels: expected a multiple of channels_per_head = {channels_per_head}"
                )
            return MPBlock(
                inputs,
                outputs,
                emb_channels,
                of_encoder=of_encoder,
                resampling=resampling,
                heads=outputs // channels_per_head if attention else 0,
                dropout=dropout,
                res_balance=res_balance,
                attn_balance=attn_balance,
                clip_act=clip_act,
            )

        first = levels.channels[0]
        self.enc, skips = build_encoder(
            levels, MPConv(img_channels + 1, first, 3), first, lambda *arguments: block(True, *arguments)
        )
        self.dec = build_decoder(
            levels, skips, lambda *arguments: block(False, *arguments), lambda size, index: size in levels.attention
        )
        self.out_conv = MPConv(first, img_channels, 3)

    def embed(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """As in `UNet`, but never in less than float32: published networks keep embeddings in it in their fp16 mode."""
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(c_noise.device):
            embedding: Tensor = self.emb_noise(self.emb_fourier(c_noise).to(wide))
            if self.emb_label is not None:
                rows = embedding.new_zeros(len(embedding), self.label_dim)
                rows = rows if class_labels is None else class_labels.to(wide)
                embedding = mp_sum(embedding, self.emb_label(rows * math.sqrt(self.label_dim)), self.label_balance)
            return mp_silu(embedding)

    def encode(
        self, x: Tensor, embedding: Tensor, features: Sequence[str]
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        # A channel of ones replaces biases.
        return super().encode(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), embedding, features)

    def join(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return mp_cat(hidden, skip, self.concat_balance)

    def head(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.out_conv(hidden, self.out_gain)
        return output


class EDM2Network(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An EDM2 checkpoint's network as `unet`, and its uncertainty u(sigma); tensors have the published names, shapes
    and order. It computes in the dtype of its parameters.

    Args:
        label_dim: number of classes; 0 for an unconditional network.
        sigma_min, sigma_max: range of the schedule; published networks were sampled between the defaults.
        channel_mult_noise: Fourier features of the noise level, in model_channels; None: as many as channels at the
            finest resolution.
        channel_mult_emb: channels of the embedding, in model_channels; None: as many as at the widest resolution.
        label_balance, concat_balance, res_balance, attn_balance: t of `mp_sum` and `mp_cat`.
        clip_act: activations are clipped to this magnitude at the end of every block; None clips none.
        logvar_channels: number of Fourier features for the uncertainty.
        label_dropout: probability with which training replaced a label by zeros; forward never does.
        latent_scale, latent_bias: [img_channels]; the network takes scale * latent + bias. None for pixels.
        pixel_range: the values of black and white in the images that the latents' autoencoder reads and writes. The
            published networks were trained on latents of images in [0, 1].

    Raises:
        ArgumentError: the channels of an attention layer are not a multiple of channels_per_head; only one of
            latent_scale and latent_bias is given; or their length is not img_channels.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        img_resolution: int,
        img_channels: int = 3,
        label_dim: int = 0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        logvar_channels: int = 128,
        label_dropout: float = 0.0,
        latent_scale: Sequence[float] | None = None,
        latent_bias: Sequence[float] | None = None,
        pixel_range: Sequence[float] = (0.0, 1.0),
    ):
        super().__init__()
        latent = (latent_scale, latent_bias)
        if latent != (None, None) and any(values is None or len(values) != img_channels for values in latent):
            raise ArgumentError(
                f"latent_scale and latent_bias: got {latent_scale} and {latent_bias}; expected {img_channels} numbers "
                "each, one per channel, or null for both"
            )
        channels = tuple(model_channels * factor for factor in channel_mult)
        self.unet = EDM2UNet(
            Levels(img_resolution, channels, num_blocks, tuple(attn_resolutions)),
            img_channels,
            label_dim,
            channels[0] if channel_mult_noise is None else model_channels * channel_mult_noise,
            max(channels) if channel_mult_emb is None else model_channels * channel_mult_emb,
            label_balance=label_balance,
            concat_balance=concat_balance,
            channels_per_head=channels_per_head,
            dropout=dropout,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip_act=clip_act,
        )
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The raw output F. x [B, C, H, W] = c_in x_t, c_noise [B] = ln(sigma) / 4, class_labels [B, label_dim] one-hot
        rows (a row of zeros or None: no class) -> [B, C, H, W].
        """
        output: Tensor = self.unet(x, c_noise, class_labels)
        return output

    def log_variance(self, c_noise: Tensor) -> Tensor:
        """The uncertainty u [B] at levels c_noise [B], which weighs the loss when a teacher is trained (eq. 21)."""
        fourier = self.logvar_fourier(c_noise).to(self.logvar_linear.weight.dtype)
        logvar: Tensor = self.logvar_linear(fourier).squeeze(1)
        return logvar

    def normalize_weights_(self) -> None:
        """Forced weight normalisation (eq. 66): every row of every weight gets unit root mean square, in place.

        This does not change what the network computes. Call it after every optimiser step; otherwise weights grow,
        which shrinks the effective steps. forward does not do it, because weights must not change
        within a graph of several passes.
        """
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize_weight_()
