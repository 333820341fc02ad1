"""Parametrisations of networks: their inputs at a level and the meaning of their outputs, from a scheduler's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
)
from torch import Tensor

from fdistill.adapters.config_fields import SCHEDULER_FIELDS, check_fields, constructor_defaults
from fdistill.adapters.pretrained import quiet_diffusers
from fdistill.base.errors import CheckpointError, did_you_mean
from fdistill.base.files import read_json_object
from fdistill.noise import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule, vp_schedule_from_config
from fdistill.prediction import Preconditioning, PredictionKind, x0_coefficients
from fdistill.student_kinds import Sampler

__all__ = ["Parametrisation", "parametrisation_from_scheduler"]


class Parametrisation(Protocol):
    """The network's inputs at level t, and the meaning of its raw output."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the network was trained with."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data."""

    @property
    def loss_weighting(self) -> str:
        """The name of the weight (`denoising_weight`) with which such networks are trained."""

    @property
    def kind(self) -> object:
        """A value that is equal for two parametrisations if their preconditioning is equal."""

    def timestep(self, t: Tensor) -> Tensor:
        """Levels t [B] -> the network's timestep inputs [B]."""

    def preconditioning(self, t: Tensor) -> Preconditioning:
        """See `Denoiser.preconditioning`."""


class EDMPreconditioning:
    """EDM: D = c_skip x_t + c_out F(c_in x_t, time_scale ln sigma) (Karras et al. 2022, table 1).

    With `boundary` > 0, c_skip and c_out are those of consistency models, where D(x, sigma = boundary) = x
    (Song et al. 2023, arXiv 2303.01469, appendix C); boundary = 0 is EDM.
    """

    def __init__(self, schedule: EDMSchedule, sigma_data: float, boundary: float, time_scale: float):
        self.schedule = schedule
        self.sigma_data = sigma_data
        self.boundary = boundary
        self.time_scale = time_scale
        self.kind = ("edm", sigma_data, boundary)
        self.loss_weighting = "edm"

    def timestep(self, t: Tensor) -> Tensor:
        return self.time_scale * t.log()

    def preconditioning(self, t: Tensor) -> Preconditioning:
        shifted = t - self.boundary
        length = torch.hypot(t, torch.full_like(t, self.sigma_data))
        skip = self.sigma_data**2 / (shifted**2 + self.sigma_data**2)
        return Preconditioning(1 / length, skip, shifted * self.sigma_data / length)


#: What a network predicts -> the weight of the squared x0-error that makes it the error of the prediction.
_LOSS_WEIGHTINGS: dict[PredictionKind, str] = {"x0": "uniform", "eps": "inverse-sigma2", "v": "v", "flow": "flow"}


class DirectPrediction:
    """The network takes x_t unscaled and the timestep `time_scale` * t, and predicts eps, v, x0 or flow."""

    def __init__(self, schedule: NoiseSchedule, kind: PredictionKind, time_scale: float = 1.0):
        self.schedule = schedule
        self.sigma_data = 0.5
        self.prediction = kind
        self.time_scale = time_scale
        self.kind = (kind, id(schedule))
        self.loss_weighting = _LOSS_WEIGHTINGS[kind]

    def timestep(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def preconditioning(self, t: Tensor) -> Preconditioning:
        if self.prediction == "x0":
            return Preconditioning()
        return Preconditioning(None, *x0_coefficients(self.schedule.alpha(t), self.schedule.sigma(t), self.prediction))


class SiTPrediction:
    """SiT's own conventions (arXiv 2401.08740): the network takes 1 - t and predicts x0 - eps."""

    def __init__(self, schedule: FlowSchedule):
        self.schedule = schedule
        self.sigma_data = 0.5
        self.kind = ("sit", schedule.t_min)
        self.loss_weighting = _LOSS_WEIGHTINGS["flow"]

    def timestep(self, t: Tensor) -> Tensor:
        return 1 - t

    def preconditioning(self, t: Tensor) -> Preconditioning:
        skip, out = x0_coefficients(self.schedule.alpha(t), self.schedule.sigma(t), "flow")
        return Preconditioning(None, skip, -out)


_TIMESTEPS = 1000  # of rectified flows in diffusers

_PREDICTION_TYPES: dict[str, PredictionKind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


#: A key that fdistill adds to a flow-matching scheduler's config, for networks whose time runs from noise to data.
TIME_CONVENTION = "time_convention"


def parametrisation_from_scheduler(config: Mapping[str, Any] | None) -> Parametrisation:
    """The parametrisation of a network, from the scheduler_config.json of its diffusers pipeline.

    Raises:
        CheckpointError: there is no config, or its scheduler, its prediction type or another field is not supported.
    """
    if config is None:
        raise CheckpointError(
            "the network's noise schedule is not known; expected scheduler/scheduler_config.json beside it: copy the "
            "pipeline that it was trained from, and put this network into the copy"
        )
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, SchedulerMixin):
        defaults = constructor_defaults(cls)  # classes differ in them: LCM's betas are those of Stable Diffusion
        config = {**defaults, **config}
        check_fields(f"scheduler/scheduler_config.json: {name}", SCHEDULER_FIELDS, config, defaults)
    try:
        return _parametrisation(config)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"scheduler/scheduler_config.json: cannot be used ({repr(error)[:200]}); expected the one of the teacher's "
            "pipeline"
        ) from error


def flow_from_scheduler(
    network: str, config: Mapping[str, Any] | None, time_scale: float | None = None
) -> DirectPrediction:
    """Like `parametrisation_from_scheduler`, for networks that can only predict the velocity of a rectified flow.

    Args:
        network: name of the network's class, for the message.
        config: the scheduler's config.
        time_scale: the network takes time_scale * t; by default the scheduler's number of timesteps.

    Raises:
        CheckpointError: there is no config, or its scheduler is not a flow-matching one; or it has another number of
            timesteps than the pipelines of these networks assume.
    """
    form = parametrisation_from_scheduler(config)
    if not isinstance(form, DirectPrediction) or form.prediction != "flow":
        raise CheckpointError(
            f"{network} with {dict(config or {}).get('_class_name')}: expected a flow-matching scheduler, such as "
            "FlowMatchEulerDiscreteScheduler"
        )
    if time_scale is None:
        return form
    if form.time_scale != _TIMESTEPS:
        raise CheckpointError(
            f"{network} with num_train_timesteps {form.time_scale:g}: its pipeline divides timesteps by {_TIMESTEPS}; "
            f"expected {_TIMESTEPS}"
        )
    return DirectPrediction(form.schedule, "flow", time_scale)


def _parametrisation(config: Mapping[str, Any]) -> Parametrisation:
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
    if name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"):  # the latter of students of a few steps
        convention = config.get(TIME_CONVENTION)
        if convention not in (None, "sit"):
            raise CheckpointError(f"{name}: {TIME_CONVENTION} got {convention!r}; expected 'sit', or no such key")
        if convention == "sit":
            return SiTPrediction(FlowSchedule())
        return DirectPrediction(FlowSchedule(), "flow", time_scale=float(config.get("num_train_timesteps", 1000)))
    scheduler = getattr(diffusers, name, None)
    if "beta_schedule" in config and isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin):
        kind = str(config.get("prediction_type", "epsilon"))
        is_flow = kind == "flow_prediction"
        if "use_flow_sigmas" in config and bool(config["use_flow_sigmas"]) != is_flow:
            raise CheckpointError(
                f"{name} with use_flow_sigmas {config['use_flow_sigmas']!r} and prediction_type {kind!r}: they "
                f"contradict each other; expected use_flow_sigmas {is_flow}"
            )
        if is_flow:  # Sana's solver; its betas are not used
            return DirectPrediction(FlowSchedule(), "flow", time_scale=float(config["num_train_timesteps"]))
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


def read_scheduler_config(folder: Path) -> dict[str, Any] | None:
    """The scheduler's config in a pipeline folder; None if there is none.

    The oldest pipeline folders hold it at the top, newer ones in scheduler/.

    Raises:
        CheckpointError: the config cannot be read or is not a JSON object.
    """
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        try:
            return read_json_object(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error!r})") from error
    return None


def scheduler_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """A scheduler's config as `save_pretrained` would write it."""
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


def load_scheduler(config: Mapping[str, Any] | None) -> SchedulerMixin | None:
    """The scheduler of a config from `read_scheduler_config`; it keeps the keys that fdistill adds."""
    if config is None:
        return None
    with quiet_diffusers("configuration_utils"):  # it warns of keys that it does not know
        scheduler: SchedulerMixin = getattr(diffusers, str(config["_class_name"])).from_config(dict(config))
    return scheduler


def one_step_scheduler(form: DirectPrediction, level: float) -> DDIMScheduler | None:
    """A DDIM scheduler whose only step starts from pure noise at timestep `level` and returns the x0-prediction.

    None if DDIM cannot do so: the schedule has no discrete timesteps, the level is not a whole number, or the network
    does not predict eps, v or x0.

    With "trailing" spacing its one timestep is the last one, and the final alpha is 1. For a student that starts below
    the last timestep the schedule is cut off at `level`.
    """
    schedule, kinds = form.schedule, {kind: name for name, kind in _PREDICTION_TYPES.items()}
    if not isinstance(schedule, VPSchedule) or form.prediction not in kinds or level != int(level):
        return None
    alphas_cumprod = schedule.alphas_cumprod[: int(level) + 1]
    betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=kinds[form.prediction],
        timestep_spacing="trailing",
        steps_offset=1,  # not used with this spacing, but StableDiffusionPipeline warns about other values
        set_alpha_to_one=True,
        clip_sample=False,
    )


def student_scheduler(
    form: Parametrisation, levels: Sequence[float], sampler: Sampler = "stochastic"
) -> tuple[SchedulerMixin, dict[str, Any]] | None:
    """The scheduler with which a text-to-image pipeline of diffusers runs a student at these levels.

    A one-step student gets DDIM or Euler. A deterministic few-step student gets Euler. A stochastic one gets the
    scheduler of latent consistency models (arXiv 2310.04378), which renoises x0 to the next level; a large
    `timestep_scaling` makes its boundary condition vanish.

    Args:
        sampler: of a student of several steps, see `FewStepGenerator`.

    Returns:
        The scheduler, and the arguments to call the pipeline with; None if no scheduler does this.
    """
    if not isinstance(form, DirectPrediction):
        return None
    if isinstance(form.schedule, FlowSchedule):
        # Networks of time_scale 1 are called by pipelines that divide by the number of timesteps again.
        count = _TIMESTEPS if form.time_scale == 1 else int(form.time_scale)
        if list(levels) == [1.0]:
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=count), {"num_inference_steps": 1}
        if sampler == "deterministic":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=count), {"sigmas": list(levels)}
        return FlowMatchLCMScheduler(num_train_timesteps=count), {"sigmas": list(levels)}
    if len(levels) == 1:
        scheduler = one_step_scheduler(form, levels[0])
        return None if scheduler is None else (scheduler, {"num_inference_steps": 1})
    kinds = {kind: name for name, kind in _PREDICTION_TYPES.items()}
    if not isinstance(form.schedule, VPSchedule) or any(level != int(level) for level in levels):
        return None
    alphas_cumprod = form.schedule.alphas_cumprod
    betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    common: dict[str, Any] = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": kinds[form.prediction],
        "steps_offset": 1,
    }
    call = {"timesteps": [int(level) for level in levels]}
    if sampler == "stochastic":
        return LCMScheduler(**common, timestep_scaling=1e6, clip_sample=False), call
    if form.prediction == "x0" or alphas_cumprod[int(levels[0])] == 0:
        return None  # Euler's scheduler reads eps and v alone, and divides by alpha
    # With this spacing it begins with noise as large as x_t is at the first level, whatever that is.
    return EulerDiscreteScheduler(**common, timestep_spacing="leading"), call
