"""The settings of a distillation and their types. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fdistill.base.errors import did_you_mean, shown
from fdistill.config import combinations, term_checks
from fdistill.config.limits import MAX_NUMBER
from fdistill.config.nested import merged
from fdistill.config.problems import explain
from fdistill.config.sections import (
    Batch,
    Count,
    CountOrZero,
    DiscriminatorConfig,
    EMAConfig,
    EvalConfig,
    FakeScoreConfig,
    Fraction,
    GeneratorConfig,
    ImagesConfig,
    LevelsConfig,
    LogConfig,
    MatchingLevelsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Positive,
    RatioConfig,
    Scale,
    Section,
    Side,
    SpeedConfig,
    Steps,
    StudentConfig,
    TeacherSamplesConfig,
)
from fdistill.config.stages import check_alike, read_stages, stage_values
from fdistill.config.terms import (
    AugmentationConfig,
    CLIPLossConfig,
    DiversityConfig,
    RegressionConfig,
    RewardConfig,
    SegmentConfig,
)
from fdistill.methods import METHODS


class DistillConfig(Section):
    """The settings of one distillation.

    An iteration is `critic_steps` updates of the critic (fake score and discriminator) followed by one update of the
    student; every number of iterations in a config counts these.
    """

    method: str = Field(
        default="f-distill", description="published method; its settings apply unless this file overrides them"
    )
    teacher: str = Field(default="digits", description="built-in teacher, folder, Hub id, or module:function")
    null_class: CountOrZero | None = Field(
        default=None,
        description="the teacher's label for `no class` (its last), if its checkpoint does not name it",
    )
    teacher_base: str | None = Field(
        default=None, description="folder or Hub id of the published pipeline that a single-file teacher was made from"
    )
    teacher_lora: str | None = Field(
        default=None, description="LoRA file, or folder of peft's, to merge into the teacher; null is none"
    )
    teacher_lora_scale: Scale = 1.0
    guidance_scale: Positive = Field(
        default=1.0,
        description="guidance scale of the teacher, against its null class or negative_prompt; 1 turns it off",
    )
    guidance_teacher: str | None = Field(
        default=None,
        description="folder, Hub id or module:function of a second network that guidance leads away from, such as one "
        "without classes or a weaker one; null uses the null class or negative_prompt",
    )
    guidance_rescale: Fraction = Field(
        default=0.0,
        description="0 to 1: how far the norm of a guided prediction is reset to the conditional one's; 0 turns it off",
    )
    negative_prompt: str = Field(
        default="", description="prompt that guidance of a text-to-image teacher leads away from"
    )
    condition_dropout: Fraction = Field(
        default=0.0, description="share of the critic's labels or prompts to replace by the null class or null prompt"
    )
    resolution: Side | None = Field(
        default=None, description="side of a text-to-image student's images in pixels; null is the teacher's"
    )
    vae: str | None = Field(
        default=None, description="folder or Hub id of the autoencoder, for a latent teacher whose folder has none"
    )
    data: str | None = Field(
        default="digits",
        description="built-in name, folder, archive, hf:name or teacher-samples; null if the method reads no images",
    )
    prompts: str | None = Field(
        default=None, description="file with one prompt per line, for a text-to-image teacher without captioned images"
    )
    buckets: CountOrZero = Field(
        default=0,
        description="without data: above 0, each batch has one of several shapes, whose sides are multiples of so many "
        "pixels, with the area of a square of resolution; 0 makes squares",
    )
    images: ImagesConfig = ImagesConfig()
    divergence: str | None = Field(
        default=None, description="name of a divergence, alpha(a), or module:function; null is the method's default"
    )
    student_level: float | list[float] | None = Field(
        default=None,
        description="noise level the student starts from, or a list of up to 8 falling levels; null is t_max",
    )
    student: StudentConfig = StudentConfig()
    iterations: Count = 400
    stages: list[dict[str, Any]] = Field(
        default=[],
        description="the run in parts, each with its iterations and the settings it changes; iterations is their sum",
    )
    batch_size: Batch = Field(default=128, description="samples per update, over all processes")
    critic_steps: Steps = 2
    reuse_samples: bool = Field(
        default=False,
        description="whether the critic's updates of an iteration share one batch and the student's samples, at new "
        "noise levels: faster, most of all with a student of several steps",
    )
    max_skipped: Count = Field(
        default=10,
        description="updates of a role in a row that may be skipped for a loss or gradient that is not finite",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    frozen_precision: Literal["fp32", "bf16", "int8", "fp8", "nf4"] = Field(
        default="fp32",
        description="precision of the weights that are not trained: the teacher's and the text encoders'; int8, fp8 "
        "and nf4 store the layers in the teacher's blocks so, and everything else in bf16",
    )
    parallel: Literal["ddp", "fsdp", "hybrid"] = Field(
        default="ddp",
        description="with several processes: each holds whole networks (ddp), or a part of each, of all processes "
        "(fsdp) or of those of its machine (hybrid)",
    )
    offload_frozen: bool = Field(
        default=False, description="keep the weights that are not trained in the CPU's memory: slower, for small GPUs"
    )
    offload_optimizers: bool = Field(
        default=False,
        description="keep trained weights, their optimisers and averages in the CPU's memory, and update them there",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, 20 to 33 % more time"
    )
    generator: GeneratorConfig = GeneratorConfig()
    fake_score: FakeScoreConfig = FakeScoreConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    regression: RegressionConfig = RegressionConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    diversity: DiversityConfig = DiversityConfig()
    segment: SegmentConfig = SegmentConfig()
    clip_loss: CLIPLossConfig = CLIPLossConfig()
    reward: RewardConfig = RewardConfig()
    teacher_samples: TeacherSamplesConfig = TeacherSamplesConfig()
    matching_levels: MatchingLevelsConfig = MatchingLevelsConfig()
    critic_levels: LevelsConfig = LevelsConfig()
    ratio: RatioConfig = RatioConfig()
    ema: EMAConfig = EMAConfig()
    speed: SpeedConfig = SpeedConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _method_settings(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("method", cls.model_fields["method"].default)
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"method: got {name!r}; {did_you_mean(str(name), METHODS)}")
        settings = combinations.method_settings(name, values.get("generator"))
        given = merged({"divergence": METHODS[name].divergence, **settings}, values)
        if given["divergence"] is None:
            given["divergence"] = METHODS[name].divergence
        objective = given.get("objective", {})
        if isinstance(objective, BaseModel):
            objective = objective.model_dump()
        if isinstance(objective, Mapping):
            given["objective"] = combinations.objective_settings(name, objective)
        if given.get("stages"):
            given["stages"] = read_stages(given["stages"])
            total = sum(stage["iterations"] for stage in given["stages"])
            if given.setdefault("iterations", total) != total:
                raise ValueError(
                    f"iterations: got {given['iterations']}, but the stages have {total} in all; leave it out, or "
                    "give their sum"
                )
        return given

    @model_validator(mode="after")
    def _fits_the_method(self) -> DistillConfig:
        name, student = self.method, self.student
        combinations.check_objective(name, self.divergence, self.generator, self.regression)
        combinations.check_discriminator(name, self.data, self.generator, self.discriminator)
        combinations.check_scores(name, self.condition_dropout, self.fake_score)
        combinations.check_reuse(name, self.reuse_samples)
        combinations.check_rates(self.iterations, self.roles)
        combinations.check_keep_best(self.log, self.eval)
        combinations.check_precision(self.precision, self.frozen_precision)
        combinations.check_parallel(self.parallel, self.frozen_precision, self.roles)
        combinations.check_student(name, student, self.regression, self.ema.snapshot_every)
        term_checks.check_augmentation(name, self.augmentation, self.guidance_scale, self.guidance_rescale)
        for term in ("diversity", "segment"):
            term_checks.check_few_step_term(name, term, getattr(self, term).weight, student, self.student_level)
        term_checks.check_image_term(name, "clip_loss", self.clip_loss)
        term_checks.check_image_term(name, "reward", self.reward)
        term_checks.check_diversity(self.diversity.weight, self.segment.weight, student)
        term_checks.check_phases(
            student, self.student_level, diversity=self.diversity.weight, regression=self.regression.weight
        )
        combinations.check_shapes(self.buckets, self.data, self.prompts)
        combinations.check_steps(self.student_level, student, data=self.data is not None)
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> DistillConfig:
        check_alike([stage.method for stage in self.stage_configs()])
        return self

    @field_validator("student_level", mode="before")
    @classmethod
    def _levels(cls, value: Any) -> Any:
        levels = value if isinstance(value, list) else [] if value is None else [value]
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level <= MAX_NUMBER:
                raise ValueError(f"got {shown(value)}; expected a level above 0, a list of them, or null")
        return [float(level) for level in levels] if isinstance(value, list) else value

    @property
    def encoder_precision(self) -> str:
        """The precision of the text encoders, "fp32" or "bf16"."""
        return "fp32" if self.frozen_precision == "fp32" else "bf16"

    def stage_configs(self) -> tuple[DistillConfig, ...]:
        """The settings of each stage, whose `iterations` are its own; this config alone if it has no stages."""
        if not self.stages:
            return (self,)
        base, found = self.model_dump(), []
        for number, stage in enumerate(self.stages, 1):
            try:
                found.append(DistillConfig.model_validate(stage_values(base, stage)))
            except ValidationError as error:
                problems = "; ".join(explain(problem, DistillConfig) for problem in error.errors())
                raise ValueError(f"stage {number}: {problems}") from error
            except ValueError as error:
                raise ValueError(f"stage {number}: {error}") from error
        return tuple(found)

    @property
    def roles(self) -> dict[str, OptimizerConfig]:
        """The sections of the roles that are trained, by name."""
        return {"generator": self.generator, "fake_score": self.fake_score, "discriminator": self.discriminator}

    @property
    def student_levels(self) -> tuple[float, ...] | None:
        """`student_level` as a tuple; None means the teacher's t_max. With `student.steps` it is the first of them."""
        level = self.student_level
        return tuple(level) if isinstance(level, list) else None if level is None else (level,)
