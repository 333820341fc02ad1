"""Teachers with random weights, of the size of published ones, for bench_step.py and bench_growth.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdistill.adapters import wrap
from fdistill.condition import TextCondition
from fdistill.denoiser import Denoiser
from fdistill.networks import EDMNetwork

#: Name -> the config and settings of a teacher with random weights.
_EDM = [
    "digits",
    "batch_size=16",
    "critic_steps=4",
    "divergence=forward-kl",
    "discriminator.source=teacher",
    "discriminator.features=[enc32,enc16,enc8]",
    "ema.decays=[0.99,0.999,0.9999]",
    "ema.export=0.999",
    "log.tracker=none",
]
WORK = {f"edm-w{width}": [*_EDM, f"teacher=bench_teachers:edm_{width}"] for width in (32, 128)}
WORK["sd15"] = [
    "sd15",
    "teacher=bench_teachers:sd15",
    "data=teacher-samples",
    "guidance_scale=1",
    "batch_size=8",
    "gradient_checkpointing=false",
    "log.tracker=none",
]


def _edm(width: int, size: int = 32) -> Denoiser:
    torch.manual_seed(0)
    network: Any = EDMNetwork(
        model_type="SongUNet",
        img_resolution=size,
        label_dim=10,
        augment_dim=9,
        model_channels=width,
        channel_mult=[2, 2, 2],
        num_blocks=4,
        attn_resolutions=[16],
    )
    with torch.no_grad():  # a new network's last layers are zero, and so are gradients
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return wrap(network.eval(), None)


def edm_32() -> Denoiser:
    """The network of EDM's CIFAR-10 teachers (DDPM++, with classes) with a quarter of their width."""
    return _edm(32)


def edm_128() -> Denoiser:
    """The network of EDM's CIFAR-10 teachers."""
    return _edm(128)


for _size in (8, 16, 32, 64, 128):  # teachers of bench_growth.py
    globals()[f"edm_32_at_{_size}"] = partial(_edm, 32, _size)


def sd15() -> Denoiser:
    """The network of Stable Diffusion 1.5 on 64 x 64; with three channels, as four would want an autoencoder."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network: Any = UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, cross_attention_dim=768, attention_head_dim=8
    )
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    denoiser = wrap(network.eval(), {**scheduler, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"})

    class Unprompted(type(denoiser)):  # type: ignore[misc]
        """Its prompts are zeros, so that no text encoder is needed."""

        text_shapes = None

        def run(self, network_input: Tensor, t: Tensor, condition: None, *arguments: Any, **options: Any) -> Any:
            zeros = TextCondition({"prompt_embeds": torch.zeros(len(t), 77, 768, device=t.device)})
            return super().run(network_input, t, zeros, *arguments, **options)

        def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Any:
            states = condition["prompt_embeds"]
            return self.network(network_input, timestep, encoder_hidden_states=states, return_dict=False)[0]

    denoiser.__class__ = Unprompted
    del denoiser.text_shapes
    return denoiser
