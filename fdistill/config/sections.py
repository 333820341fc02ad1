"""The sections of a config: the settings of each part of a distillation."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from fdistill.base.network_sizes import check_sizes
from fdistill.config.limits import (
    MAX_BATCH,
    MAX_BINS,
    MAX_COUNT,
    MAX_NUMBER,
    MAX_RANK,
    MAX_SIDE,
    MAX_STEPS,
    MAX_WORKERS,
    distinct,
)
from fdistill.ema_profiles import MAX_SIGMA_REL, MIN_SIGMA_REL, profile_name
from fdistill.student_kinds import MAX_STUDENT_STEPS, STUDENT_KINDS, KindName, Sampler, kinds_with

Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=MAX_NUMBER, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
RelativeWidth = Annotated[float, Field(ge=MIN_SIGMA_REL, le=MAX_SIGMA_REL)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
ScoreWeighting = Literal["normalised", "uniform", "vsd"]
StudentSteps = Annotated[int, Field(ge=1, le=MAX_STUDENT_STEPS)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Names = Annotated[list[str], AfterValidator(distinct)]
NetworkSettings = Annotated[dict[str, Any], AfterValidator(check_sizes)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)


Weighting = Literal["edm", "inverse-sigma2", "v", "flow", "min-snr", "uniform"]


class OptimizerConfig(Section):
    """AdamW for one role. Before every update its gradients are clipped to the global norm grad_clip."""

    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        default="adamw",
        description="adamw-8bit stores both moments in 8 bits, 2 bytes per parameter instead of 8, by bitsandbytes",
    )
    lr: Positive = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = Field(
        default="constant",
        description="what lr does after its warm-up; linear and cosine fall to 0 at the end, inverse-sqrt never ends",
    )
    lr_hold: Count = Field(default=100, description="iterations for which inverse-sqrt keeps lr before it falls")
    lr_warmup: CountOrZero = Field(default=0, description="iterations in which lr rises to its value, in equal steps")
    beta1: Decay = 0.0
    beta2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: Positive = 10.0

    @property
    def needs_the_end(self) -> bool:
        """Whether the rate of an iteration depends on how many there are."""
        return self.lr_schedule in ("linear", "cosine")


class MicroBatchConfig(Section):
    """How much of a batch an update computes at a time; gradients are accumulated over the whole batch."""

    micro_batch: Batch | None = Field(
        default=None, description="samples that a process computes at a time; null is all of its batch at once"
    )


class LoRAConfig(Section):
    """Adapters on a frozen network that is shared with the teacher (LoRA, arXiv 2106.09685)."""

    lora_rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = Field(
        default=0, description="rank of the adapters to train; 0 trains all weights"
    )
    lora_alpha: Positive | None = Field(
        default=None, description="adapters are scaled by alpha / rank; null is the rank"
    )
    lora_targets: Names | None = Field(
        default=None,
        description="name endings of the layers to adapt, such as [to_q, to_v]; null is all linear and conv layers",
    )


class FakeScoreConfig(OptimizerConfig, MicroBatchConfig, LoRAConfig):
    """The fake-score network, which keeps learning to denoise the student's samples."""

    checkpoint: str | None = Field(
        default=None,
        description="checkpoint to start from, or a run's folder for its last fake score; null is the teacher",
    )
    weighting: Weighting | None = Field(
        default=None, description="weight of its loss over noise levels; null is the one the teacher was trained with"
    )
    min_snr_gamma: Positive = 5.0
    guidance_scale: Positive = Field(
        default=1.0, description="guidance scale of the fake score when compared with the teacher; 1 turns it off"
    )
    training_guidance_scale: Positive = Field(
        default=1.0,
        description="guidance scale of the fake score in its own training (SiD-LSG's long guidance); 1 turns it off",
    )
    alignment: Fraction = Field(
        default=0.0,
        description="share of the student's weights that the fake score takes over after each of the student's updates "
        "(SenseFlow's implicit distribution alignment: 0.02 or 0.03); 0 turns it off",
    )


class DiscriminatorConfig(OptimizerConfig):
    """Heads on features of the fake-score network ("fake") or of the teacher."""

    checkpoint: str | None = Field(
        default=None, description="a run's folder, whose last discriminator to start from; null is a new one"
    )
    source: Literal["fake", "teacher"] = "fake"
    features: Names = Field(default=["mid"], min_length=1)
    head: Literal["convolutional", "pooled", "channel-mean"] = "convolutional"
    gan_weight: NonNegative = Field(
        default=1e-2, description="weight of the discriminator's loss in the critic's; 0 turns it off"
    )
    gan_weighting: Weighting = "uniform"
    shared_noise: bool = Field(
        default=False, description="noise data and student samples with the same noise, to the same levels"
    )
    r1_weight: NonNegative = Field(
        default=0.0,
        description="weight of the R1 penalty on noised data: gamma of the exact one; 100 to 1000 is usual for the "
        "approximate one; 0 turns it off",
    )
    r1: Literal["exact", "approximate"] = Field(
        default="exact",
        description="penalise the gradient of the logit, or how far the logits move under a little noise, which needs "
        "no second derivative",
    )
    r1_sigma: Positive = Field(default=0.1, description="standard deviation of the noise of the approximate penalty")


class GeneratorConfig(OptimizerConfig, MicroBatchConfig):
    """The optimiser and the loss of the student."""

    gan_weight: NonNegative = Field(
        default=1e-3, description="weight of the GAN term beside distribution matching; 0 turns it off"
    )
    gan_gradient_ratio: NonNegative = Field(
        default=0.0,
        description="above 0, each update sets gan_weight so that the norm of the GAN term's gradient on the image is "
        "this many times the matching term's; 0 keeps gan_weight fixed",
    )
    weighting: ScoreWeighting = Field(
        default="normalised", description="how the score difference is weighted over samples and noise levels"
    )
    normaliser_floor: Positive = Field(
        default=1e-6, description="the least that weighting=normalised divides by: max(mean|x0 - x0'|, this)"
    )


class StudentConfig(LoRAConfig):
    """The student's network, if it is not a copy of the teacher."""

    generator: KindName = Field(
        default="denoiser",
        description="; ".join(f"{name} evaluates {kind.evaluates}" for name, kind in STUDENT_KINDS.items()),
    )
    steps: StudentSteps | None = Field(
        default=None,
        description="number of steps, at levels along the teacher's own schedule; null takes one step at every "
        "student_level",
    )
    shift: Positive | None = Field(
        default=None, description="how far student.steps are shifted towards noise, for flows; null is the teacher's"
    )
    sampler: Sampler = Field(
        default="stochastic",
        description="between two steps x0 is noised again: stochastic with new noise, deterministic with the noise "
        "that the step implies (Euler, DDIM)",
    )
    simulated: Fraction = Field(
        default=1.0,
        description="share of the iterations in which a middle step gets what the student's own earlier steps made; "
        "in the others it gets noised data",
    )
    any_step: bool = Field(
        default=False, description="whether a student of several steps is trained to take fewer of them as well"
    )
    phases: StudentSteps = Field(
        default=1,
        description="number of experts that share the steps, each an adapter for its interval of noise; a run trains "
        "one (phased DMD)",
    )
    previous_phase: str | None = Field(
        default=None, description="folder of the run that trained the phase before; null trains the first phase"
    )
    noise_kl_weight: NonNegative = Field(
        default=0.0,
        description=f"weight of the KL divergence of {' and '.join(kinds_with('predicts_noise'))}'s predicted noise "
        "from a standard normal; 0 turns it off",
    )

    checkpoint: str | None = Field(default=None, description="checkpoint to start from; null is the teacher")
    network: NetworkSettings = Field(
        default_factory=dict,
        description="changes to the network's config, such as fewer blocks; weights that still fit are copied",
    )


class ObjectiveConfig(Section):
    """Settings of the method's objective, under the names in its row of the table (`methods.Method.options`)."""

    model_config = ConfigDict(extra="allow")


class ImagesConfig(Section):
    """How image files are converted to the format that the teacher was trained on."""

    recipe: Literal["exact", "center-box", "center-lanczos", "adm", "squash"] = "exact"
    flip: bool = Field(default=False, description="mirror half of the images, chosen at random")
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = Field(
        default=2, description="decoding processes per training process"
    )


class TeacherSamplesConfig(Section):
    """Samples of the teacher's own sampler (Heun, 2 num_steps - 1 evaluations each), drawn once and cached."""

    count: Count = Field(default=2000, description="number of samples to draw with data=teacher-samples")
    num_steps: Steps = 18


class LevelsConfig(Section):
    """How training levels are drawn. `low` and `high` are the ends of the range in use, as fractions of t with
    `uniform`, and of the Karras grid with `karras`."""

    sampler: Literal["karras", "uniform", "lognormal", "shifted"] = "karras"
    low: Fraction = 0.0
    high: Fraction = 1.0
    rho: Annotated[float, Field(gt=0, le=1e3)] = 7.0
    shift: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=3.0, description="how far `shifted` moves uniform levels towards noise (SD3); 1 moves none"
    )
    mean: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = -1.2
    std: Annotated[float, Field(gt=0, le=100)] = 1.2

    @model_validator(mode="after")
    def _ordered(self) -> LevelsConfig:
        if self.low >= self.high:
            raise ValueError(f"expected low < high, got {self.low} and {self.high}")
        return self


class MatchingLevelsConfig(LevelsConfig):
    """Levels at which scores are compared. The ends are left out, where the score difference carries little information
    (DMD2)."""

    low: Fraction = 0.02
    high: Fraction = 0.98


class RatioConfig(Section):
    """The density ratio and its two-stage normalisation."""

    # A logit is clamped to +-10 before it becomes a ratio, so wider bounds would never be reached.
    lower: Annotated[float, Field(ge=math.exp(-10), le=1)] = 0.1
    upper: Annotated[float, Field(ge=1, le=math.exp(10))] = 20.0
    num_bins: Annotated[int, Field(ge=1, le=MAX_BINS)] = 10
    bin_edges: Literal["log-sigma", "linear"] = "log-sigma"
    momentum: Decay = 0.0
    warmup: CountOrZero = Field(default=50, description="iterations over which weights ramp from 1 to h / mean(h)")


class EMAConfig(Section):
    """Averages of the student's weights, one for each decay (per iteration) and one for each relative width of a power
    function (EDM2); the exported student is one of them."""

    decays: Annotated[list[Decay], AfterValidator(distinct)] = [0.98]
    sigma_rel: Annotated[list[RelativeWidth], AfterValidator(distinct)] = []
    export: float | str = Field(
        default=0.98, description="average to export: one of decays, or one of sigma_rel, as in sigma_rel=0.1"
    )
    snapshot_every: CountOrZero = Field(
        default=0,
        description="iterations between snapshots of the sigma_rel averages, for `fdistill ema`; 0 turns them off",
    )

    @field_validator("export", mode="before")
    @classmethod
    def _average(cls, value: Any) -> Any:
        """Makes sigma_rel=0.10 and sigma_rel=0.1 the same name."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"got {value!r}, expected one of decays, or one of sigma_rel as sigma_rel=0.1")
        kind, _, width = str(value).partition("=")
        try:
            return profile_name(float(width)) if kind == "sigma_rel" else value
        except ValueError:
            return value

    @model_validator(mode="after")
    def _fits(self) -> EMAConfig:
        profiles = [profile_name(width) for width in self.sigma_rel]
        if self.export not in [*self.decays, *profiles]:
            raise ValueError(
                f"export: got {self.export}, expected one of decays {self.decays}"
                + (f" or {', '.join(profiles)}" if profiles else "")
            )
        if self.snapshot_every and not self.sigma_rel:
            raise ValueError(
                f"snapshot_every: got {self.snapshot_every}, but snapshots store the averages of sigma_rel, which is "
                "empty; expected widths such as [0.05, 0.1], or snapshot_every=0"
            )
        return self


class SpeedConfig(Section):
    """How networks are run. Each setting changes results by rounding alone; `speed=off` is torch as it comes."""

    channels_last: bool = Field(
        default=False, description="the weights and activations of convolutions have their channels last in memory"
    )
    compile: bool = Field(
        default=False, description="torch.compile for each block of the networks; the first iterations take minutes"
    )
    share_cores: bool = Field(
        default=True,
        description="on a CPU, one thread fewer for each core that others use, unless OMP_NUM_THREADS is set",
    )

    @model_validator(mode="before")
    @classmethod
    def _all_off(cls, given: Any) -> Any:
        return {"share_cores": False} if given is False or given == "off" else given


class LogConfig(Section):
    """What a run writes, and how many iterations apart. 0 turns sample grids or intermediate checkpoints off."""

    every: Count = 10
    samples_every: CountOrZero = 100
    checkpoint_every: CountOrZero = 100
    keep_checkpoints: Count = Field(default=2, description="how many of the newest checkpoints to keep")
    keep_best: bool = Field(default=False, description="keep the checkpoint of the best score in eval as well")
    tracker: Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab", "trackio", "none"] = (
        "tensorboard"
    )


class EvalConfig(Section):
    """Scores of the exported average during training; the best one so far is saved as a separate student in best/."""

    every: CountOrZero = Field(default=0, description="iterations between evaluations; 0 turns them off")
    protocol: str = Field(default="digits", description="a protocol of `fdistill evaluate`")
    num_images: Count | None = Field(default=None, description="number of images; null is the protocol's number")
    metrics: Names | None = Field(default=None, description="some of the protocol's metrics; null is its default ones")
    metric: str | None = Field(
        default=None, description="metric that decides which student is best; null is the first that can be measured"
    )
    reference: str | None = Field(default=None, description="reference images or statistics, if the protocol has none")
    prompts: str | None = Field(default=None, description="file with one prompt per line, if the protocol has none")
    weights: list[str] = Field(default=[], description="files of published weights, as for evaluate --weights")
    batch_size: Batch = 64
    allow_skipped: bool = Field(
        default=False, description="compare with reference images of which more than 1 % cannot be read"
    )


class SmokeConfig(Section):
    """A recipe's smoke section: the tiny teacher and data that `--smoke` uses instead, and settings that fit those."""

    pipeline: str | None = Field(
        default=None,
        description="class of a tiny text-to-image pipeline; network and scheduler then change its own",
    )
    network: NetworkSettings = Field(
        default_factory=dict, description="_class_name and settings of a tiny network of the teacher's family"
    )
    scheduler: NetworkSettings | None = Field(
        default=None, description="_class_name and settings of the scheduler for that network"
    )
    vae: NetworkSettings | None = Field(default=None, description="settings of a latent teacher's AutoencoderKL")
    images: Annotated[int, Field(ge=1, le=10_000)] = Field(default=16, description="number of images, over all classes")
    overrides: dict[str, Any] = Field(default_factory=dict, description="settings that override the recipe's")

    @model_validator(mode="after")
    def _one_teacher(self) -> SmokeConfig:
        if self.pipeline is not None and self.vae is not None:
            raise ValueError("vae: the tiny pipeline has its own; leave it out")
        return self
