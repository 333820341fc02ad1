"""Small denoisers: one with exact scores, one real network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DModel
from torch import Tensor

from fdistill.denoiser import Denoiser, Features
from fdistill.kernels.layout import expand
from fdistill.noise import EDMSchedule, NoiseSchedule


class GaussianDenoiser(Denoiser):
    """The exact posterior mean of data N(mean, std^2 I) under any schedule; its only feature is (x_t, t) itself."""

    def __init__(self, mean: float, std: float, schedule: NoiseSchedule | None = None, size: int = 1):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(float(mean)))
        self.std = torch.nn.Parameter(torch.tensor(float(std)))
        self.schedule = schedule or EDMSchedule()
        self.sample_shape = (1, 1, size)
        self.num_classes = None
        self.sigma_data = 0.5
        self.feature_shapes = {"x_t": (1, 1, size)}

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Tensor | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        x_t = network_input
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        prediction = self.mean + gain * (x_t - alpha * self.mean)
        tapped = {"x_t": x_t, "t": t} if features else {}
        return (prediction if output_grad else prediction.detach()) if output else None, tapped


def tiny_unet(**changes: object) -> UNet2DModel:
    settings: dict[str, object] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "num_class_embeds": 10,
    }
    return UNet2DModel(**(settings | changes)).eval()
