"""The sections of a config: what each part of a distillation may be told."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fdistill.ema_profiles import MAX_SIGMA_REL, MIN_SIGMA_REL, profile_name

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
RelativeWidth = Annotated[float, Field(ge=MIN_SIGMA_REL, le=MAX_SIGMA_REL)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)


Weighting = Literal["edm", "inverse-sigma2", "min-snr", "uniform"]


class OptimizerConfig(Section):
    """AdamW of one role; gradients are clipped to a global norm before every update."""

    lr: Positive = 1e-4
    beta1: Decay = 0.0
    beta2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: Positive = 10.0


class LoRAConfig(Section):
    """Adapters on a frozen network that is shared with the teacher (LoRA, arXiv 2106.09685)."""

    lora_rank: CountOrZero = Field(default=0, description="train adapters of this rank on a shared teacher; 0 is all")
    lora_alpha: Positive | None = Field(default=None, description="adapters count alpha / rank; null is the rank")
    lora_targets: list[str] | None = Field(
        default=None, description="ends of layers' names, as [to_q, to_v]; null is all linear and convolutional ones"
    )


class FakeScoreConfig(OptimizerConfig, LoRAConfig):
    """The fake-score network: keeps learning to denoise what the student makes."""

    weighting: Weighting = "edm"
    min_snr_gamma: Positive = 5.0
    guidance_scale: Positive = Field(default=1.0, description="of the fake score beside the guided teacher's; 1 is off")
    training_guidance_scale: Positive = Field(
        default=1.0, description="of the fake score while it learns (SiD-LSG's long guidance); 1 is off"
    )


class DiscriminatorConfig(OptimizerConfig):
    """Heads on features of the fake-score network ("fake") or of the teacher."""

    source: Literal["fake", "teacher"] = "fake"
    features: list[str] = Field(default=["mid"], min_length=1)
    head: Literal["convolutional", "channel-mean"] = "convolutional"
    gan_weight: NonNegative = Field(default=1e-2, description="of the discriminator's loss in the critic's")
    gan_weighting: Weighting = "uniform"
    r1_weight: NonNegative = Field(default=0.0, description="gamma of the R1 penalty on noised data; 0 is off")


class GeneratorConfig(OptimizerConfig):
    """The student."""

    gan_weight: NonNegative = Field(default=1e-3, description="of the GAN term beside distribution matching")
    gan_gradient_ratio: NonNegative = Field(
        default=0.0,
        description="above 0, gan_weight is set anew in each update: the GAN term's gradient on the image gets this "
        "times the norm of the matching term's",
    )
    weighting: Literal["normalised", "uniform", "vsd"] = Field(
        default="normalised", description="of the score difference over samples and noise levels"
    )


class StudentConfig(LoRAConfig):
    """The student's network, where it is not a copy of the teacher."""

    generator: Literal["denoiser", "tiue"] = Field(
        default="denoiser",
        description="tiue evaluates a UNet's encoder once and its decoder at every level of student_level",
    )
    noise_kl_weight: NonNegative = Field(
        default=0.0, description="of the KL divergence of tiue's predicted noise from a standard normal"
    )

    checkpoint: str | None = Field(default=None, description="start from this checkpoint; null is the teacher")
    network: dict[str, Any] = Field(
        default_factory=dict, description="changes to the network's config, such as fewer blocks; what fits is copied"
    )


class ObjectiveConfig(Section):
    """Settings of one objective alone, under the names in its method's row (`methods.Method.options`)."""

    model_config = ConfigDict(extra="allow")


class RegressionConfig(Section):
    """DMD's regression on pairs of noise and what the teacher's ODE makes of it from the student's level."""

    weight: NonNegative = 0.0
    pairs: CountOrZero = 2000


class ImagesConfig(Section):
    """How image files become what the teacher was trained on."""

    recipe: Literal["exact", "center-box", "center-lanczos", "adm", "squash"] = "exact"
    flip: bool = Field(default=False, description="mirror every other image, at random")
    workers: Count = Field(default=2, description="processes that decode, for each process that trains")


class CLIPLossConfig(Section):
    """A hinge on the CLIP similarity of the student's images and their prompts; needs the autoencoder in every step."""

    weight: NonNegative = Field(default=0.0, description="0 is off")
    margin: Fraction = Field(default=0.35, description="cosine similarity from which on there is no loss")
    model: str = Field(default="ViT-B-32", description="a name that open_clip knows")
    weights: str | None = Field(default=None, description="safetensors file of its weights")


class TeacherSamplesConfig(Section):
    """Samples of the teacher's own sampler (Heun, 2 num_steps - 1 evaluations), made once and cached."""

    count: Count = Field(default=2000, description="with data=teacher-samples, how many stand in for data")
    num_steps: Count = 18


class LevelsConfig(Section):
    """How training levels are drawn. low and high cut `uniform` (over t) or `karras` (over the Karras grid)."""

    sampler: Literal["karras", "uniform", "lognormal", "shifted"] = "karras"
    low: Fraction = 0.0
    high: Fraction = 1.0
    rho: Positive = 7.0
    shift: Positive = Field(default=3.0, description="of `shifted`, uniform levels moved towards noise (SD3)")
    mean: Annotated[float, Field(allow_inf_nan=False)] = -1.2
    std: Positive = 1.2

    @model_validator(mode="after")
    def _ordered(self) -> LevelsConfig:
        if self.low >= self.high:
            raise ValueError(f"expected low < high, got {self.low} and {self.high}")
        return self


class MatchingLevelsConfig(LevelsConfig):
    """Levels at which scores are compared: the ends, where they say least, are left out (DMD2)."""

    low: Fraction = 0.02
    high: Fraction = 0.98


class RatioConfig(Section):
    """The density ratio and its two-stage normalisation."""

    # A logit is clamped to +-10 before it becomes a ratio: wider bounds would silently not be reached.
    lower: Annotated[float, Field(ge=math.exp(-10), le=1)] = 0.1
    upper: Annotated[float, Field(ge=1, le=math.exp(10))] = 20.0
    num_bins: Count = 10
    bin_edges: Literal["log-sigma", "linear"] = "log-sigma"
    momentum: Decay = 0.0
    warmup: CountOrZero = Field(default=50, description="iterations in which weights ramp from 1 to h / mean(h)")


class EMAConfig(Section):
    """Averages of the student's weights, one for each decay (per iteration) and one for each relative width of a power
    function (EDM2); the exported student is one of them."""

    decays: list[Decay] = [0.98]
    sigma_rel: list[RelativeWidth] = []
    export: float | str = Field(default=0.98, description="one of decays, or one of sigma_rel as sigma_rel=0.1")
    snapshot_every: CountOrZero = Field(
        default=0, description="keep the averages of sigma_rel every so many iterations, for `fdistill ema`; 0 is off"
    )

    @field_validator("export", mode="before")
    @classmethod
    def _average(cls, value: Any) -> Any:
        """sigma_rel=0.10 and sigma_rel=0.1 are one name."""
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
                f"snapshot_every: got {self.snapshot_every}, but snapshots are of sigma_rel, which is empty; "
                "expected widths such as [0.05, 0.1], or snapshot_every=0"
            )
        return self


class LogConfig(Section):
    """What a run writes, and how often in iterations. 0 turns sample grids, or intermediate checkpoints, off."""

    every: Count = 10
    samples_every: CountOrZero = 100
    checkpoint_every: CountOrZero = 100
    keep_checkpoints: Count = 2
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"


class EvalConfig(Section):
    """Scores of the exported average while it learns; the best so far is kept as a student of its own, in best/."""

    every: CountOrZero = Field(default=0, description="iterations between measurements; 0 is off")
    protocol: str = Field(default="digits", description="one that `fdistill evaluate` knows")
    num_images: Count | None = Field(default=None, description="null is the protocol's count")
    metrics: list[str] | None = Field(default=None, description="names out of the protocol's; null is its own choice")
    metric: str | None = Field(
        default=None, description="the one that says which is best; null is the first that can be measured"
    )
    reference: str | None = Field(default=None, description="images or statistics, where the protocol has none")
    prompts: str | None = Field(default=None, description="a file with one a line, where the protocol has none")
    weights: list[str] = Field(default=[], description="files of published weights, as --weights of evaluate")
    batch_size: Count = 64


class SmokeConfig(Section):
    """A recipe's smoke section: what `--smoke` makes in place of its teacher and data, and settings that fit those."""

    pipeline: str | None = Field(
        default=None,
        description="of a text-to-image recipe: class of a tiny pipeline; network and scheduler then change its own",
    )
    network: dict[str, Any] = Field(
        default_factory=dict, description="_class_name and settings of a tiny network of the teacher's family"
    )
    scheduler: dict[str, Any] | None = Field(
        default=None, description="_class_name and settings of the scheduler beside it"
    )
    vae: dict[str, Any] | None = Field(default=None, description="settings of a latent teacher's AutoencoderKL")
    images: Count = Field(default=16, description="how many, over all classes")
    overrides: dict[str, Any] = Field(default_factory=dict, description="over the recipe's settings")

    @model_validator(mode="after")
    def _one_teacher(self) -> SmokeConfig:
        if self.pipeline is not None and self.vae is not None:
            raise ValueError("vae: the tiny pipeline has its own; leave it out")
        return self
