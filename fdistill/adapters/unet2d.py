"""diffusers UNet2DModel pipelines (pixel space, class-conditional or not) as denoisers.

The scheduler beside the network says what the network predicts: EDM or consistency-model preconditioning, eps / v / x0
of a DDPM-style schedule, or the velocity of a rectified flow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from safetensors import SafetensorError
from torch import Tensor

from fdistill.denoiser import Denoiser, Features, Preconditioning
from fdistill.errors import ArgumentError, CheckpointError, did_you_mean
from fdistill.files import read_json_object
from fdistill.noise import (
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    PredictionKind,
    expand,
    vp_schedule_from_config,
    x0_coefficients,
)


class Parametrisation(Protocol):
    """What the network is fed at level t, and what its raw output means."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Levels the network was trained at."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data."""

    @property
    def kind(self) -> object:
        """Equal where the preconditioning is."""

    def timestep(self, t: Tensor) -> Tensor:
        """[B] levels -> [B] timesteps the network is told."""

    def preconditioning(self, t: Tensor) -> Preconditioning:
        """See `Denoiser.preconditioning`."""


class EDMPreconditioning:
    """D = c_skip x_t + c_out F(c_in x_t, time_scale ln sigma) (Karras et al. 2022, table 1).

    With `boundary` > 0, c_skip and c_out are those of consistency models, where D(x, sigma = boundary) = x
    (Song et al. 2023, arXiv 2303.01469, appendix C); boundary = 0 is EDM.
    """

    def __init__(self, schedule: EDMSchedule, sigma_data: float, boundary: float, time_scale: float):
        self.schedule = schedule
        self.sigma_data = sigma_data
        self.boundary = boundary
        self.time_scale = time_scale
        self.kind = ("edm", sigma_data, boundary)

    def timestep(self, t: Tensor) -> Tensor:
        return self.time_scale * t.log()

    def preconditioning(self, t: Tensor) -> Preconditioning:
        shifted = t - self.boundary
        length = torch.hypot(t, torch.full_like(t, self.sigma_data))
        skip = self.sigma_data**2 / (shifted**2 + self.sigma_data**2)
        return Preconditioning(1 / length, skip, shifted * self.sigma_data / length)


class DirectPrediction:
    """The network sees x_t as it is and a timestep `time_scale` * t, and predicts eps, v, x0 or flow."""

    def __init__(self, schedule: NoiseSchedule, kind: PredictionKind, time_scale: float = 1.0):
        self.schedule = schedule
        self.sigma_data = 0.5
        self.prediction = kind
        self.time_scale = time_scale
        self.kind = (kind, id(schedule))

    def timestep(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def preconditioning(self, t: Tensor) -> Preconditioning:
        if self.prediction == "x0":
            return Preconditioning()
        return Preconditioning(None, *x0_coefficients(self.schedule.alpha(t), self.schedule.sigma(t), self.prediction))


_PREDICTION_TYPES: dict[str, PredictionKind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def parametrisation_from_scheduler(config: Mapping[str, Any]) -> Parametrisation:
    """What a diffusers scheduler_config.json says about the network beside it.

    Raises:
        CheckpointError: a scheduler or prediction type that is not supported.
    """
    name = str(config.get("_class_name"))
    if name == "CMStochasticIterativeScheduler":
        sigma_min = float(config["sigma_min"])
        schedule = EDMSchedule(sigma_min, float(config["sigma_max"]))
        return EDMPreconditioning(schedule, float(config["sigma_data"]), boundary=sigma_min, time_scale=250.0)
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise CheckpointError(
                f"{name}: prediction_type {config['prediction_type']!r} is not supported; expected 'epsilon'"
            )
        schedule = EDMSchedule(float(config["sigma_min"]), float(config["sigma_max"]))
        return EDMPreconditioning(schedule, float(config["sigma_data"]), boundary=0.0, time_scale=0.25)
    if name == "FlowMatchEulerDiscreteScheduler":
        return DirectPrediction(FlowSchedule(), "flow", time_scale=float(config.get("num_train_timesteps", 1000)))
    if "beta_schedule" in config:
        kind = str(config.get("prediction_type", "epsilon"))
        if kind not in _PREDICTION_TYPES:
            raise CheckpointError(f"{name}: prediction_type got {kind!r}; {did_you_mean(kind, _PREDICTION_TYPES)}")
        vp = vp_schedule_from_config(config)
        if kind == "epsilon" and config.get("rescale_betas_zero_snr"):
            raise CheckpointError(
                f"{name}: rescale_betas_zero_snr with prediction_type 'epsilon' leaves x0 undefined at the last "
                "timestep; expected 'v_prediction' or 'sample'"
            )
        return DirectPrediction(vp, _PREDICTION_TYPES[kind])
    supported = (
        "CMStochasticIterativeScheduler",
        "EDMEulerScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "DDPMScheduler",
    )
    raise CheckpointError(
        f"scheduler {name!r} is not supported; {did_you_mean(name, supported)} and other DDPM-style ones"
    )


class UNet2DDenoiser(Denoiser):
    """A UNet2DModel and its parametrisation. Features: "down0", "down1", ... (last of each resolution) and "mid"."""

    def __init__(self, unet: UNet2DModel, parametrisation: Parametrisation):
        super().__init__()
        config: Any = unet.config
        if config.out_channels != config.in_channels:
            raise CheckpointError(
                f"UNet2DModel with {config.in_channels} input and {config.out_channels} output channels: expected as "
                "many outputs as inputs (learned variances are not supported)"
            )
        size = config.sample_size
        if not isinstance(size, int):
            raise CheckpointError(f"UNet2DModel: expected one integer as sample_size, got {size!r}")
        self.unet = unet
        self.parametrisation = parametrisation
        self.schedule = parametrisation.schedule
        self.sigma_data = parametrisation.sigma_data
        self.kind = parametrisation.kind
        self.sample_shape = (config.in_channels, size, size)
        self.num_classes = config.num_class_embeds
        self.feature_shapes = {}
        for i, channels in enumerate(config.block_out_channels):
            self.feature_shapes[f"down{i}"] = (channels, size >> i, size >> i)
        if unet.mid_block is not None:
            last = len(config.block_out_channels) - 1
            self.feature_shapes["mid"] = (config.block_out_channels[-1], size >> last, size >> last)

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.parametrisation.preconditioning(t)

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
        timestep = self.parametrisation.timestep(t)
        hidden, residuals, embedding, tapped = self._encode(network_input, timestep, condition, features)
        if not output:
            return None, tapped
        with nullcontext() if output_grad else torch.no_grad():
            return self._decode(hidden, residuals, embedding, timestep), tapped

    # _encode and _decode walk UNet2DModel's own blocks in the order of its forward, so that features can be read
    # without hooks and the decoder can be left out; test_unet2d holds them to the model's output bit by bit.
    def _encode(
        self, sample: Tensor, timestep: Tensor, labels: Tensor | None, features: Sequence[str]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Features]:
        unet: Any = self.unet
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
        unet: Any = self.unet
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


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """What diffusers would log while it loads is said once, in the error that `load` raises."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def load(folder: Path) -> UNet2DDenoiser:
    """The denoiser in a pipeline folder with `unet/` (a UNet2DModel, safetensors) and `scheduler/`.

    Raises:
        CheckpointError: a file is missing, truncated, or does not fit the architecture its config names.
    """
    try:
        parametrisation = parametrisation_from_scheduler(
            read_json_object(folder / "scheduler" / "scheduler_config.json")
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: cannot use scheduler/scheduler_config.json ({error!r})") from error
    try:
        with _quiet_diffusers():
            unet, info = UNet2DModel.from_pretrained(
                folder / "unet", use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / 'unet'}: cannot load the weights ({' '.join(str(error).split())[:400]}); "
            "expected a complete diffusion_pytorch_model.safetensors that fits config.json"
        ) from error
    wrong = {
        key: names
        for key, names in info.items()
        if names and key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if wrong:
        listed = "; ".join(
            f"{len(names)} {key.replace('_', ' ')} such as {next(iter(names))}" for key, names in wrong.items()
        )
        raise CheckpointError(f"{folder / 'unet'}: the weights do not fit config.json: {listed}")
    return UNet2DDenoiser(unet, parametrisation)


def check_exportable(denoiser: Denoiser) -> None:
    """Raises CheckpointError if no pipeline of plain diffusers can run a one-step student of this denoiser."""
    form = getattr(denoiser, "parametrisation", None)
    if not isinstance(form, EDMPreconditioning) or form.time_scale != 250.0 or form.boundary != form.schedule.t_min:
        raise CheckpointError(
            "this version exports students of teachers with a CMStochasticIterativeScheduler (EDM preconditioning, "
            "timestep 250 ln sigma) only; expected such a teacher folder"
        )


def export(denoiser: Denoiser, levels: Sequence[float], folder: Path) -> list[int]:
    """Writes a student as a ConsistencyModelPipeline folder: plain diffusers runs it, in one step at the only level, or
    at several with the returned `timesteps`.

    A consistency model's pipeline starts from sigma_max * noise and takes D(x, sigma_max) as its sample, which is what
    a one-step student is once sigma_max is the student's level. Further levels are points of its Karras grid, made
    fine enough to hold any level to five digits.
    """
    check_exportable(denoiser)
    assert isinstance(denoiser, UNet2DDenoiser)
    assert isinstance(denoiser.parametrisation, EDMPreconditioning)
    form, rho = denoiser.parametrisation, 7.0
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
    ConsistencyModelPipeline(unet=denoiser.unet, scheduler=scheduler).save_pretrained(folder)
    return timesteps
