"""Time-independent UNet encoder (TiUE; "One-Way Ticket", arXiv 2505.21960): a UNet's encoder is evaluated once, its
decoder at several levels in one batch, and DDIM makes a sample of what they predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition, TextCondition, as_labels
from fdistill.denoiser import Denoiser
from fdistill.generator import Student
from fdistill.kernels.checks import wide
from fdistill.kernels.layout import expand
from fdistill.noise import NoiseSchedule, VPSchedule


def leading_levels(schedule: NoiseSchedule, count: int = 4) -> tuple[float, ...]:
    """The timesteps of DDIM's "leading" spacing with offset 1: 751, 501, 251, 1 for four of a thousand.

    Raises:
        ArgumentError: a schedule that is not one of discrete timesteps, or more levels than it has.
    """
    if not isinstance(schedule, VPSchedule) or not 1 <= count < len(schedule.alphas_cumprod):
        raise ArgumentError(
            f"decoder_levels: {count} cannot be spaced over a {type(schedule).__name__}; name them, falling within "
            f"({schedule.t_min:g}, {schedule.t_max:g}]"
        )
    spacing = len(schedule.alphas_cumprod) // count
    return tuple(float(k * spacing + 1) for k in reversed(range(count)))


class TiUEGenerator(Student):
    """A UNet whose encoder and middle run at the first of K levels, and whose decoder runs at all of them: no
    prediction is fed back, so the K decoders are one batch.

    Args:
        denoiser: the student network, usually a copy of the teacher; its network is a `UNet2DModel` or a
            `UNet2DConditionModel`, and may predict eps, v, x0 or anything else that a `Denoiser` has a name for.
        decoder_levels: falling, all in (t_min, t_max] of the denoiser's schedule; `leading_levels` are the paper's.

    Attributes:
        levels: where its one noise is put in: the first of `decoder_levels`.
    """

    def __init__(self, denoiser: Denoiser, decoder_levels: Sequence[float]):
        super().__init__()
        schedule, network = denoiser.schedule, getattr(denoiser, "network", None)
        if not isinstance(network, (UNet2DModel, UNet2DConditionModel)):
            raise ArgumentError(
                f"generator tiue: got a {type(denoiser if network is None else network).__name__}, whose encoder "
                "cannot be run without its decoder; expected a UNet2DModel or UNet2DConditionModel of diffusers"
            )
        given = list(decoder_levels)
        falling = all(a > b for a, b in pairwise(given))
        if not given or not falling or not (schedule.t_min < given[-1] and given[0] <= schedule.t_max):
            raise ArgumentError(
                f"decoder_levels: expected falling numbers in ({schedule.t_min:g}, {schedule.t_max:g}], got {given}"
            )
        self.denoiser = denoiser
        self.decoder_levels = tuple(float(level) for level in given)
        self.levels = self.decoder_levels[:1]
        self._rows = composition(denoiser, self.decoder_levels).tolist()

    @property
    def network_levels(self) -> tuple[float, ...]:
        return self.decoder_levels

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "decoder_levels": list(self.decoder_levels)}

    def describe(self) -> str:
        return f"one encoder, decoders at levels {', '.join(f'{level:g}' for level in self.decoder_levels)}"

    def forward(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """Standard normal noise [B, C, H, W], labels [B], prompts or None -> x0 [B, C, H, W], at least float32."""
        return _combined(self._rows[-1], self._parts(noise, condition))

    def sample_with_predictions(self, noise: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """`forward`, and the noise [B, K, C, H, W] that the decoders predict, whatever their network's outputs are."""
        parts = self._parts(noise, condition)
        predicted = torch.stack([_combined(row, parts) for row in self._rows[:-1]], dim=1)
        return _combined(self._rows[-1], parts), predicted

    def _parts(self, noise: Tensor, condition: Condition | None) -> list[Tensor]:
        """What a sample is a combination of: the noise, and the K outputs."""
        outputs = self.outputs(noise, condition)
        return [noise.to(wide(noise.dtype)), *outputs.to(wide(outputs.dtype)).unbind(1)]

    def outputs(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's outputs [B, K, C, H, W] at the K levels, in its own precision; arguments as in `forward`."""
        denoiser: Any = self.denoiser
        unet, batch, count = denoiser.network, len(noise), len(self.decoder_levels)
        # Filled on the device: a tensor made of numbers would be copied there, and waited for.
        t = torch.cat([noise.new_full((batch,), level, dtype=wide(noise.dtype)) for level in self.decoder_levels])
        first = t[:batch]
        network_input = denoiser.network_input(expand(denoiser.schedule.start(first), noise) * noise, first)
        timestep = denoiser.parametrisation.timestep(t)
        told = _tiled(as_told(unet, condition, self.num_classes), count)
        embedding, text = embed(unet, timestep, told, network_input.dtype)
        encoded = encode(unet, network_input, embedding[:batch], None if text is None else text[:batch])
        copies = Encoded(
            torch.cat([encoded.hidden] * count), tuple(torch.cat([residual] * count) for residual in encoded.residuals)
        )
        copied = decode(unet, copies, embedding, text, timestep)
        outputs: Tensor = copied.unflatten(0, (count, batch)).transpose(0, 1)
        return outputs


def composition(denoiser: Denoiser, levels: Sequence[float]) -> Tensor:
    """DDIM without feedback in closed form, [K + 1, K + 1] float64 on the CPU.

    Columns stand for the noise [0] and the network's K outputs. Row k is the noise that output k predicts, the last row
    the sample: DDIM's steps (arXiv 2010.02502, eq. 12, eta = 0) are linear in both, so that for eps-prediction
    z0 = S noise + sum_k E_k output_k. As in the schedulers of Stable Diffusion, the last step ends at the schedule's
    t_min, not at a signal of 1 (`set_alpha_to_one=False`).
    """
    schedule, count = denoiser.schedule, len(levels)
    t = torch.tensor([*levels, schedule.t_min], dtype=torch.float64, device="cpu")
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    _, skip, out = denoiser.preconditioning(t[:-1])
    skip = torch.zeros_like(t) if skip is None else skip
    out = torch.ones_like(t) if out is None else out
    unit = torch.eye(count + 1, dtype=torch.float64)
    z, rows = schedule.start(t[0]) * unit[0], []
    for k in range(count):
        x0 = skip[k] * z + out[k] * unit[k + 1]
        eps = (z - alpha[k] * x0) / sigma[k]
        rows.append(eps)
        z = alpha[k + 1] * x0 + sigma[k + 1] * eps
    return torch.stack([*rows, z])


def _combined(row: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    total = row[0] * parts[0]
    for coefficient, part in zip(row[1:], parts[1:], strict=True):
        total = total + coefficient * part
    return total


def as_told(unet: nn.Module, condition: Condition | None, num_classes: int | None) -> Condition | None:
    """The condition, if it is of the kind that this network is told; ArgumentError otherwise."""
    if isinstance(unet, UNet2DModel):
        return as_labels(condition, num_classes)
    if not isinstance(condition, TextCondition):
        got = "None" if condition is None else "labels"
        raise ArgumentError(f"condition: got {got}; this network wants a TextCondition, as PromptEncoder makes")
    return condition


def _tiled(condition: Condition | None, count: int) -> Condition | None:
    """One whole batch after another, as the copies of encoded samples are."""
    if isinstance(condition, TextCondition):
        return TextCondition.concat([condition] * count)
    return None if condition is None else torch.cat([condition] * count)


# A diffusers UNet in three parts, which walk the model's own blocks in the order of its forward; test_tiue holds them
# to the model's output bit by bit.


class Encoded(NamedTuple):
    """What a UNet's encoder and middle give its decoder: `hidden`, and the skip connections in the encoder's order."""

    hidden: Tensor
    residuals: tuple[Tensor, ...]


def embed(
    network: nn.Module, timestep: Tensor, condition: Condition | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """[B] timesteps and a condition -> the embedding [B, D] that every block is given, and the text [B, L, E] of those
    with cross-attention.

    Args:
        dtype: of the network's input.
    """
    unet: Any = network
    if isinstance(condition, TextCondition):
        own = next(unet.parameters()).dtype
        told = {
            name: value.to(own) if value.is_floating_point() else value for name, value in condition.tensors.items()
        }
        text = told.pop("prompt_embeds")
        embedding = unet.time_embedding(unet.time_proj(timestep).to(dtype))
        added = unet.get_aug_embed(embedding, text, told)
        embedding = embedding if added is None else embedding + added
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        return embedding, unet.process_encoder_hidden_states(text, told)
    embedding = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
    if unet.class_embedding is not None:
        labels = unet.time_proj(condition) if unet.config.class_embed_type == "timestep" else condition
        embedding = embedding + unet.class_embedding(labels).to(unet.dtype)
    return embedding, None


def encode(network: nn.Module, sample: Tensor, embedding: Tensor, text: Tensor | None) -> Encoded:
    """conv_in, all down blocks and the middle."""
    unet: Any = network
    if unet.config.center_input_sample:
        sample = 2 * sample - 1
    skip, hidden = sample, unet.conv_in(sample)
    residuals: tuple[Tensor, ...] = (hidden,)
    for block in unet.down_blocks:
        if hasattr(block, "skip_conv"):
            hidden, block_residuals, skip = block(hidden_states=hidden, temb=embedding, skip_sample=skip)
        else:
            hidden, block_residuals = block(hidden, embedding, **_attended(block, text))
        residuals += block_residuals
    if unet.mid_block is not None:
        hidden = unet.mid_block(hidden, embedding, **_attended(unet.mid_block, text))
    return Encoded(hidden, residuals)


def decode(network: nn.Module, encoded: Encoded, embedding: Tensor, text: Tensor | None, timestep: Tensor) -> Tensor:
    """All up blocks and what follows them: the network's output [B, C, H, W]."""
    unet: Any = network
    hidden, residuals = encoded
    skip: Tensor | None = None
    for block in unet.up_blocks:
        count = len(block.resnets)
        residuals, block_residuals = residuals[:-count], residuals[-count:]
        if hasattr(block, "skip_conv"):
            hidden, skip = block(hidden, block_residuals, embedding, skip)
        elif text is None:
            hidden = block(hidden, block_residuals, embedding)
        else:
            # The size of the next block's skips: not always twice this one's.
            size = residuals[-1].shape[2:] if residuals else None
            hidden = block(hidden, block_residuals, embedding, upsample_size=size, **_attended(block, text))
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    output: Tensor = unet.conv_out(hidden)
    if skip is not None:
        output = output + skip
    if unet.config.time_embedding_type == "fourier" and isinstance(unet, UNet2DModel):
        output = output / expand(timestep, output)
    return output


def _attended(block: nn.Module, text: Tensor | None) -> dict[str, Tensor | None]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
