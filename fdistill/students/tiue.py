"""Time-independent UNet encoder (TiUE; "One-Way Ticket", arXiv 2505.21960): a UNet's encoder is evaluated once, its
decoder at several levels in one batch, and DDIM combines the decoders' predictions into a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from fdistill.adapters.text_to_image import as_prompts
from fdistill.adapters.unet_blocks import decode, embed, encode
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition, TextCondition, as_labels
from fdistill.denoiser import Denoiser
from fdistill.generator import Student, falling_levels
from fdistill.kernels.checks import wide
from fdistill.kernels.layout import expand
from fdistill.noise import NoiseSchedule, VPSchedule


def leading_levels(schedule: NoiseSchedule, count: int = 4) -> tuple[float, ...]:
    """The timesteps of DDIM's "leading" spacing with offset 1: 751, 501, 251, 1 for four of a thousand.

    Raises:
        ArgumentError: the schedule has no discrete timesteps, or not more of them than `count`.
    """
    if not isinstance(schedule, VPSchedule) or not 1 <= count < len(schedule.alphas_cumprod):
        raise ArgumentError(
            f"decoder_levels: {count} levels cannot be spaced over a {type(schedule).__name__}; give them, falling, "
            f"in ({schedule.t_min:g}, {schedule.t_max:g}]"
        )
    spacing = len(schedule.alphas_cumprod) // count
    return tuple(float(k * spacing + 1) for k in reversed(range(count)))


class TiUEGenerator(Student):
    """A UNet whose encoder and middle block run at the first of K levels, and whose decoder runs at all K.

    No prediction is fed back into the network, so the K decoder evaluations are one batch.

    Args:
        denoiser: the student's denoiser, usually a copy of the teacher; its network is a `UNet2DModel` or a
            `UNet2DConditionModel`, with any parametrisation (eps, v, x0, EDM's, ...).
        decoder_levels: the K levels, falling, all in (t_min, t_max] of the denoiser's schedule; the paper's are those
            of `leading_levels`.

    Attributes:
        levels: the one level at which noise enters: the first of `decoder_levels`.
    """

    def __init__(self, denoiser: Denoiser, decoder_levels: Sequence[float]):
        super().__init__()
        network = denoiser.network
        if not isinstance(network, (UNet2DModel, UNet2DConditionModel)):
            raise ArgumentError(
                f"generator tiue: got a {type(denoiser if network is None else network).__name__}, whose encoder "
                "cannot be run without its decoder; expected a UNet2DModel or UNet2DConditionModel of diffusers"
            )
        self.denoiser = denoiser
        self.decoder_levels = falling_levels("decoder_levels", decoder_levels, denoiser.schedule)
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
        """Standard normal noise [B, C, H, W] and labels [B], prompts or None -> x0 [B, C, H, W], at least float32."""
        return _combined(self._rows[-1], self._parts(noise, condition))

    def sample_with_predictions(self, noise: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """The result of `forward`, and the K predictions converted to predicted noise [B, K, C, H, W]."""
        parts = self._parts(noise, condition)
        predicted = torch.stack([_combined(row, parts) for row in self._rows[:-1]], dim=1)
        return _combined(self._rows[-1], parts), predicted

    def _parts(self, noise: Tensor, condition: Condition | None) -> list[Tensor]:
        """The terms that a sample is a linear combination of: the noise, and the K outputs."""
        outputs = self.outputs(noise, condition)
        return [noise.to(wide(noise.dtype)), *outputs.to(wide(outputs.dtype)).unbind(1)]

    def outputs(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's outputs [B, K, C, H, W] at the K levels, in the network's dtype; arguments as in `forward`."""
        denoiser = self.denoiser
        unet, batch, count = denoiser.network, len(noise), len(self.decoder_levels)
        # Filled on the device: a tensor made from Python numbers would be copied there, and the host would wait.
        t = torch.cat([noise.new_full((batch,), level, dtype=wide(noise.dtype)) for level in self.decoder_levels])
        first = t[:batch]
        network_input = denoiser.network_input(expand(denoiser.schedule.start(first), noise) * noise, first)
        timestep = denoiser.parametrisation.timestep(t)
        tiled = _tiled(accepted_condition(unet, condition, self.num_classes), count)
        embedding, text = embed(unet, timestep, tiled, network_input.dtype)
        encoded = encode(unet, network_input, embedding[:batch], None if text is None else text[:batch])
        copies = encoded._replace(
            hidden=torch.cat([encoded.hidden] * count),
            residuals=tuple(torch.cat([residual] * count) for residual in encoded.residuals),
        )
        copied = decode(unet, copies, embedding, text, timestep)
        outputs: Tensor = copied.unflatten(0, (count, batch)).transpose(0, 1)
        return outputs


def composition(denoiser: Denoiser, levels: Sequence[float]) -> Tensor:
    """DDIM without feedback in closed form, [K + 1, K + 1] float64 on the CPU.

    Column 0 holds the coefficients of the noise, columns 1 to K those of the network's K outputs. Row k gives the noise
    that output k predicts, the last row the sample. DDIM's steps (arXiv 2010.02502, eq. 12, eta = 0) are linear in
    noise and outputs, so that for eps-prediction z0 = S noise + sum_k E_k output_k. As in the schedulers of Stable
    Diffusion, the last step ends at the schedule's t_min, not at a signal of 1 (`set_alpha_to_one=False`).
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


def accepted_condition(unet: nn.Module, condition: Condition | None, num_classes: int | None) -> Condition | None:
    """Returns the condition if this network takes its kind, labels or prompts; raises ArgumentError otherwise."""
    if isinstance(unet, UNet2DModel):
        return as_labels(condition, num_classes)
    return as_prompts(condition)


def _tiled(condition: Condition | None, count: int) -> Condition | None:
    """The whole batch, `count` times in a row: the same order as the copies of the encoder's output."""
    if isinstance(condition, TextCondition):
        return TextCondition.concat([condition] * count)
    return None if condition is None else torch.cat([condition] * count)
