"""diffusers UNet2DModel pipelines (pixel space, class-conditional or not) as denoisers.

The scheduler beside the network says what the network predicts: EDM or consistency-model preconditioning, eps / v / x0
of a DDPM-style schedule, or the velocity of a rectified flow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    UNet2DModel,
)
from torch import Tensor, nn

from fdistill.adapters.parametrisation import (
    DirectPrediction,
    EDMPreconditioning,
    Parametrisation,
    one_step_scheduler,
    parametrisation_from_scheduler,
)
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.condition import Condition, as_labels
from fdistill.denoiser import Denoiser, Features
from fdistill.kernels.layout import expand
from fdistill.prediction import Preconditioning


def _drop_variances(network: UNet2DModel) -> None:
    """Cuts the outputs that only an ancestral sampler reads (Nichol & Dhariwal 2021, arXiv 2102.09672)."""
    unet: Any = network
    channels = unet.config.in_channels
    last: nn.Conv2d = unet.conv_out
    kept = nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)  # type: ignore[arg-type]
    kept.load_state_dict({name: value[:channels] for name, value in last.state_dict().items()})
    unet.conv_out = kept.to(last.weight.device, last.weight.dtype)
    unet.register_to_config(out_channels=channels)


class UNet2DDenoiser(Denoiser):
    """A UNet2DModel and its parametrisation. Features: "down0", "down1", ... (last of each resolution) and "mid"."""

    def __init__(self, network: UNet2DModel, parametrisation: Parametrisation):
        super().__init__()
        config: Any = network.config
        if config.out_channels == 2 * config.in_channels:
            _drop_variances(network)
        elif config.out_channels != config.in_channels:
            raise CheckpointError(
                f"UNet2DModel with {config.in_channels} input and {config.out_channels} output channels: expected as "
                "many outputs as inputs, or twice as many where variances are learned"
            )
        size = config.sample_size
        if not isinstance(size, int):
            raise CheckpointError(f"UNet2DModel: expected one integer as sample_size, got {size!r}")
        self.network = network
        self.parametrisation = parametrisation
        self.schedule = parametrisation.schedule
        self.sigma_data = parametrisation.sigma_data
        self.kind = parametrisation.kind
        self.sample_shape = (config.in_channels, size, size)
        self.num_classes = config.num_class_embeds
        self.feature_shapes = {}
        for i, channels in enumerate(config.block_out_channels):
            self.feature_shapes[f"down{i}"] = (channels, size >> i, size >> i)
        if network.mid_block is not None:
            last = len(config.block_out_channels) - 1
            self.feature_shapes["mid"] = (config.block_out_channels[-1], size >> last, size >> last)

    def with_network(self, network: UNet2DModel) -> UNet2DDenoiser:
        """The same reading of another network of this class."""
        return UNet2DDenoiser(network, self.parametrisation)

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.parametrisation.preconditioning(t)

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Condition | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        timestep = self.parametrisation.timestep(t)
        labels = as_labels(condition, self.num_classes)
        hidden, residuals, embedding, tapped = self._encode(network_input, timestep, labels, features)
        if not output:
            return None, tapped
        with nullcontext() if output_grad else torch.no_grad():
            return self._decode(hidden, residuals, embedding, timestep), tapped

    # _encode and _decode walk UNet2DModel's own blocks in the order of its forward, so that features can be read
    # without hooks and the decoder can be left out; test_unet2d holds them to the model's output bit by bit.
    def _encode(
        self, sample: Tensor, timestep: Tensor, labels: Tensor | None, features: Sequence[str]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Features]:
        unet: Any = self.network
        config = unet.config
        if config.center_input_sample:
            sample = 2 * sample - 1
        embedding = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
        if unet.class_embedding is not None:
            if labels is None:
                raise ArgumentError(f"condition: this network wants class labels [B] in [0, {self.num_classes})")
            if config.class_embed_type == "timestep":
                labels = unet.time_proj(labels)
            embedding = embedding + unet.class_embedding(labels).to(unet.dtype)

        tapped: Features = {}
        skip, hidden = sample, unet.conv_in(sample)
        residuals: tuple[Tensor, ...] = (hidden,)
        for i, block in enumerate(unet.down_blocks):
            if hasattr(block, "skip_conv"):
                hidden, block_residuals, skip = block(hidden_states=hidden, temb=embedding, skip_sample=skip)
            else:
                hidden, block_residuals = block(hidden_states=hidden, temb=embedding)
            residuals += block_residuals
            if f"down{i}" in features:
                tapped[f"down{i}"] = block_residuals[config.layers_per_block - 1]
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, embedding)
            if "mid" in features:
                tapped["mid"] = hidden
        return hidden, residuals, embedding, tapped

    def _decode(self, hidden: Tensor, residuals: tuple[Tensor, ...], embedding: Tensor, timestep: Tensor) -> Tensor:
        unet: Any = self.network
        skip: Tensor | None = None
        for block in unet.up_blocks:
            count = len(block.resnets)
            residuals, block_residuals = residuals[:-count], residuals[-count:]
            if hasattr(block, "skip_conv"):
                hidden, skip = block(hidden, block_residuals, embedding, skip)
            else:
                hidden = block(hidden, block_residuals, embedding)
        hidden = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        if skip is not None:
            hidden = hidden + skip
        if unet.config.time_embedding_type == "fourier":
            hidden = hidden / expand(timestep, hidden)
        return hidden


NETWORK = UNet2DModel


def wrap(network: UNet2DModel, scheduler: Mapping[str, Any] | None) -> UNet2DDenoiser:
    """The denoiser of a network and the config of the scheduler beside it; CheckpointError if they do not fit."""
    return UNet2DDenoiser(network, parametrisation_from_scheduler(scheduler))


def native_pipeline(
    denoiser: Denoiser, levels: Sequence[float], index: Mapping[str, Any], vae: AutoencoderKL | None
) -> tuple[DiffusionPipeline, dict[str, Any]] | None:
    """A pipeline of diffusers' own that runs a student at these levels, and the arguments it has to be called with; or
    None.

    Args:
        index: model_index.json of the teacher; empty if it has none.
    """
    assert isinstance(denoiser, UNet2DDenoiser)
    if vae is not None:
        return None  # these pipelines are of pixels
    form = denoiser.parametrisation
    if isinstance(form, EDMPreconditioning) and form.time_scale == 250.0 and form.boundary == form.schedule.t_min:
        return _consistency_model(denoiser.network, form, levels)
    if isinstance(form, DirectPrediction) and denoiser.num_classes is None and len(levels) == 1:
        scheduler = one_step_scheduler(form, levels[0])
        if scheduler is not None:
            chosen = DDPMPipeline if index.get("_class_name") == "DDPMPipeline" else DDIMPipeline
            return chosen(unet=denoiser.network, scheduler=scheduler), {"num_inference_steps": 1}
    return None


def _consistency_model(
    network: UNet2DModel, form: EDMPreconditioning, levels: Sequence[float]
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A consistency model's pipeline starts from sigma_max * noise and takes D(x, sigma_max) as its sample, which is
    what a one-step student is once sigma_max is the student's level. Further levels are points of its Karras grid, made
    fine enough to hold any level to five digits.
    """
    rho = 7.0
    points = 40 if len(levels) == 1 else 1_000_001
    top, bottom = levels[0] ** (1 / rho), form.boundary ** (1 / rho)
    timesteps = [round((top - level ** (1 / rho)) / (top - bottom) * (points - 1)) for level in reversed(levels)]
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=points,
        sigma_min=form.boundary,
        sigma_max=levels[0],
        sigma_data=form.sigma_data,
        rho=rho,
        clip_denoised=False,  # a few-step student's intermediate samples are not clipped in training
    )
    call = {"num_inference_steps": 1} if len(levels) == 1 else {"num_inference_steps": None, "timesteps": timesteps}
    return ConsistencyModelPipeline(unet=network, scheduler=scheduler), call
