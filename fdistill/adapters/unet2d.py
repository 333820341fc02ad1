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
    UNet2DModel,
)
from torch import Tensor

from fdistill.adapters.config_fields import check_network
from fdistill.adapters.family import Family, Runnable
from fdistill.adapters.float32_layers import amplified_output_in_float32
from fdistill.adapters.parametrisation import (
    DirectPrediction,
    EDMPreconditioning,
    Parametrisation,
    one_step_scheduler,
    parametrisation_from_scheduler,
)
from fdistill.adapters.unet_blocks import decode, embed, encode
from fdistill.adapters.variances import without_dropout, without_variances
from fdistill.base.errors import CheckpointError
from fdistill.condition import Condition, as_labels
from fdistill.denoiser import Denoiser, Features
from fdistill.prediction import Preconditioning


class UNet2DDenoiser(Denoiser):
    """A UNet2DModel and its parametrisation.

    Features: "down0", "down1", ..., the outputs of the last layer of each resolution, and "mid", the middle block's.
    """

    parametrisation: Parametrisation

    def __init__(self, network: UNet2DModel, parametrisation: Parametrisation):
        super().__init__()
        check_network(network)
        config: Any = network.config
        if network.class_embedding is not None and config.num_class_embeds is None:
            raise CheckpointError(
                f"UNet2DModel with class_embed_type {config.class_embed_type!r} and without num_class_embeds: the "
                "number of its classes is not known; expected both or neither"
            )
        without_variances(network, "conv_out")
        amplified_output_in_float32(network, "conv_out", parametrisation)
        size = config.sample_size
        if not isinstance(size, int):
            raise CheckpointError(f"UNet2DModel: expected one integer as sample_size, got {size!r}")
        self.network = without_dropout(network)
        self.parametrisation = parametrisation
        self.schedule = parametrisation.schedule
        self.sigma_data = parametrisation.sigma_data
        self.kind = parametrisation.kind
        self.loss_weighting = parametrisation.loss_weighting
        self.sample_shape = (config.in_channels, size, size)
        self.num_classes = config.num_class_embeds
        self.feature_shapes = {}
        for i, channels in enumerate(config.block_out_channels):
            self.feature_shapes[f"down{i}"] = (channels, size >> i, size >> i)
        if network.mid_block is not None:
            last = len(config.block_out_channels) - 1
            self.feature_shapes["mid"] = (config.block_out_channels[-1], size >> last, size >> last)

    def with_network(self, network: UNet2DModel) -> UNet2DDenoiser:
        """A denoiser of another network of this class, with the same parametrisation."""
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
        labels, timestep = as_labels(condition, self.num_classes), self.parametrisation.timestep(t)
        embedding, _ = embed(self.network, timestep, labels, network_input.dtype)
        encoded = encode(self.network, network_input, embedding, None, features)
        if not output:
            return None, encoded.features
        with nullcontext() if output_grad else torch.no_grad():
            return decode(self.network, encoded, embedding, None, timestep), encoded.features


def wrap(network: UNet2DModel, scheduler: Mapping[str, Any] | None) -> UNet2DDenoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return UNet2DDenoiser(network, parametrisation_from_scheduler(scheduler))


def native_pipeline(
    denoiser: UNet2DDenoiser, levels: Sequence[float], index: Mapping[str, Any], vae: AutoencoderKL | None
) -> Runnable | None:
    """See `Family`: a consistency model's pipeline, or the teacher's DDPM or DDIM pipeline with one step."""
    if vae is not None:
        return None  # these pipelines generate pixels
    form = denoiser.parametrisation
    if isinstance(form, EDMPreconditioning) and form.time_scale == 250.0 and form.boundary == form.schedule.t_min:
        return _consistency_model(denoiser.network, form, levels)
    if isinstance(form, DirectPrediction) and denoiser.num_classes is None and len(levels) == 1:
        scheduler = one_step_scheduler(form, levels[0])
        if scheduler is not None:
            chosen = DDPMPipeline if index.get("_class_name") == "DDPMPipeline" else DDIMPipeline
            return chosen(unet=denoiser.network, scheduler=scheduler), {"num_inference_steps": 1}
    return None


def _consistency_model(network: UNet2DModel, form: EDMPreconditioning, levels: Sequence[float]) -> Runnable:
    """The pipeline of consistency models, set up to run a student at these levels.

    It starts from sigma_max * noise and takes D(x, sigma_max) as the sample: with sigma_max at the student's level,
    that is what a one-step student does. Further levels are points of the pipeline's Karras grid, which is made so fine
    that it holds any level to five digits.
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


FAMILY = Family(UNet2DModel, wrap, native_pipeline)
