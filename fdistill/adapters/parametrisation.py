"""What a network is fed at a level and what its raw output means, read from the diffusers scheduler beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
)
from torch import Tensor

from fdistill.adapters.pretrained import quiet_diffusers
from fdistill.base.errors import CheckpointError, did_you_mean
from fdistill.base.files import read_json_object
from fdistill.noise import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule, vp_schedule_from_config
from fdistill.prediction import Preconditioning, PredictionKind, x0_coefficients


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
        """[B] levels -> [B] timesteps that the network is given."""

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


class SiTPrediction:
    """SiT's own conventions (arXiv 2401.08740): the network is given 1 - t and predicts x0 - eps."""

    def __init__(self, schedule: FlowSchedule):
        self.schedule = schedule
        self.sigma_data = 0.5
        self.kind = ("sit", schedule.t_min)

    def timestep(self, t: Tensor) -> Tensor:
        return 1 - t

    def preconditioning(self, t: Tensor) -> Preconditioning:
        skip, out = x0_coefficients(self.schedule.alpha(t), self.schedule.sigma(t), "flow")
        return Preconditioning(None, skip, -out)


_PREDICTION_TYPES: dict[str, PredictionKind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


#: A key of ours in a flow-matching scheduler's config, for networks that count time from noise to data.
TIME_CONVENTION = "time_convention"


def parametrisation_from_scheduler(config: Mapping[str, Any] | None) -> Parametrisation:
    """What a diffusers scheduler_config.json says about the network beside it.

    Raises:
        CheckpointError: no config, or a scheduler or prediction type that is not supported.
    """
    if config is None:
        raise CheckpointError(
            "checkpoint: the network says nothing about its noise schedule; expected scheduler/scheduler_config.json "
            "beside it, as in the pipeline it was published with"
        )
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
    """`parametrisation_from_scheduler` for networks that can only predict the velocity of a rectified flow.

    Args:
        network: its class, for the message.
        time_scale: the network is given time_scale * t; by default as many timesteps as the scheduler has.

    Raises:
        CheckpointError: no config, or another scheduler.
    """
    form = parametrisation_from_scheduler(config)
    if not isinstance(form, DirectPrediction) or form.prediction != "flow":
        raise CheckpointError(
            f"{network} with {dict(config or {}).get('_class_name')}: expected a flow-matching scheduler, such as "
            "FlowMatchEulerDiscreteScheduler"
        )
    return form if time_scale is None else DirectPrediction(form.schedule, "flow", time_scale)


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
    if name == "FlowMatchEulerDiscreteScheduler":
        convention = config.get(TIME_CONVENTION)
        if convention not in (None, "sit"):
            raise CheckpointError(f"{name}: {TIME_CONVENTION} got {convention!r}; expected 'sit', or no such key")
        if convention == "sit":
            return SiTPrediction(FlowSchedule())
        return DirectPrediction(FlowSchedule(), "flow", time_scale=float(config.get("num_train_timesteps", 1000)))
    scheduler = getattr(diffusers, name, None)
    if "beta_schedule" in config and isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin):
        kind = str(config.get("prediction_type", "epsilon"))
        if kind == "flow_prediction":  # Sana's solver, whose betas are not read
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
    """The scheduler config of a pipeline folder, the oldest form of which has all components in one folder; None if
    there is none.

    Raises:
        CheckpointError: a config that is not a JSON object.
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
    """What `save_pretrained` would write for a scheduler."""
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


def load_scheduler(config: Mapping[str, Any] | None) -> SchedulerMixin | None:
    """The scheduler of a `read_scheduler_config`, keys of ours included."""
    if config is None:
        return None
    with quiet_diffusers("configuration_utils"):  # which warns of keys that are not its own
        scheduler: SchedulerMixin = getattr(diffusers, str(config["_class_name"])).from_config(dict(config))
    return scheduler


def one_step_scheduler(form: DirectPrediction, level: float) -> DDIMScheduler | None:
    """A DDIM scheduler whose only step starts from pure noise at timestep `level` and returns the x0-prediction; None
    where there is no such thing.

    With "trailing" spacing its one timestep is the last, and "the alpha before it" is 1. A student that starts earlier
    gets the schedule cut off there.
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
        steps_offset=1,  # not read with this spacing, but StableDiffusionPipeline wants it
        set_alpha_to_one=True,
        clip_sample=False,
    )


def student_scheduler(form: Parametrisation, levels: Sequence[float]) -> tuple[SchedulerMixin, dict[str, Any]] | None:
    """A scheduler of diffusers' with which a text-to-image pipeline runs a student at these levels, and the arguments
    it has to be called with; None where there is no such thing.

    One step is one of DDIM or Euler. A few are those of latent consistency models (arXiv 2310.04378), whose scheduler
    renoises x0 to the next level; the boundary condition that it has beside is scaled away.
    """
    if not isinstance(form, DirectPrediction):
        return None
    if isinstance(form.schedule, FlowSchedule):
        if list(levels) == [1.0]:
            return FlowMatchEulerDiscreteScheduler(), {"num_inference_steps": 1}
        return FlowMatchLCMScheduler(), {"sigmas": list(levels)}
    if len(levels) == 1:
        scheduler = one_step_scheduler(form, levels[0])
        return None if scheduler is None else (scheduler, {"num_inference_steps": 1})
    kinds = {kind: name for name, kind in _PREDICTION_TYPES.items()}
    if not isinstance(form.schedule, VPSchedule) or any(level != int(level) for level in levels):
        return None
    alphas_cumprod = form.schedule.alphas_cumprod
    betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    few_steps = LCMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=kinds[form.prediction],
        steps_offset=1,
        timestep_scaling=1e6,
        clip_sample=False,
    )
    return few_steps, {"timesteps": [int(level) for level in levels]}
