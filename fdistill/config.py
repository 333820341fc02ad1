"""The typed description of a distillation: defaults < YAML file < key=value overrides. Imports no torch.

YAML is read by the 1.2 rules, so `1e-5` is a number and `no` is a word.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fdistill.ema_profiles import MAX_SIGMA_REL, MIN_SIGMA_REL, profile_name
from fdistill.errors import ConfigError, did_you_mean
from fdistill.methods import METHODS, check_combination

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
RelativeWidth = Annotated[float, Field(ge=MIN_SIGMA_REL, le=MAX_SIGMA_REL)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)


Weighting = Literal["edm", "inverse-sigma2", "min-snr", "uniform"]


class OptimizerConfig(_Section):
    """AdamW of one role; gradients are clipped to a global norm before every update."""

    lr: Positive = 1e-4
    beta1: Decay = 0.0
    beta2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: Positive = 10.0


class FakeScoreConfig(OptimizerConfig):
    """The fake-score network: keeps learning to denoise what the student makes."""

    weighting: Weighting = "edm"
    min_snr_gamma: Positive = 5.0
    lora_rank: CountOrZero = Field(default=0, description="train adapters of this rank on a shared teacher; 0 is all")


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
    weighting: Literal["normalised", "uniform", "vsd"] = Field(
        default="normalised", description="of the score difference over samples and noise levels"
    )


class StudentConfig(_Section):
    """The student's network, where it is not a copy of the teacher."""

    checkpoint: str | None = Field(default=None, description="start from this checkpoint; null is the teacher")
    network: dict[str, Any] = Field(
        default_factory=dict, description="changes to the network's config, such as fewer blocks; what fits is copied"
    )


class ObjectiveConfig(_Section):
    """What only some methods have: SiD's alpha, SIM's pseudo-Huber constant, Uni-Instruct's biased variant."""

    alpha: Annotated[float, Field(allow_inf_nan=False)] | None = None
    huber_c: Positive | None = None
    detach_weight: bool = False


class RegressionConfig(_Section):
    """DMD's regression on pairs of noise and what the teacher's ODE makes of it from the student's level."""

    weight: NonNegative = 0.0
    pairs: CountOrZero = 2000


class ImagesConfig(_Section):
    """How image files become what the teacher was trained on."""

    recipe: Literal["exact", "center-box", "center-lanczos", "adm", "squash"] = "exact"
    flip: bool = Field(default=False, description="mirror every other image, at random")
    workers: Count = Field(default=2, description="processes that decode, for each process that trains")


class TeacherSamplesConfig(_Section):
    """Samples of the teacher's own sampler (Heun, 2 num_steps - 1 evaluations), made once and cached."""

    count: Count = Field(default=2000, description="with data=teacher-samples, how many stand in for data")
    num_steps: Count = 18


class LevelsConfig(_Section):
    """How training levels are drawn. low and high cut `uniform` (over t) or `karras` (over the Karras grid)."""

    sampler: Literal["karras", "uniform", "lognormal"] = "karras"
    low: Fraction = 0.0
    high: Fraction = 1.0
    rho: Positive = 7.0
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


class RatioConfig(_Section):
    """The density ratio and its two-stage normalisation."""

    lower: Annotated[float, Field(gt=0, le=1)] = 0.1
    upper: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 20.0
    num_bins: Count = 10
    bin_edges: Literal["log-sigma", "linear"] = "log-sigma"
    momentum: Decay = 0.0
    warmup: CountOrZero = Field(default=50, description="iterations in which weights ramp from 1 to h / mean(h)")


class EMAConfig(_Section):
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


class LogConfig(_Section):
    """What a run writes, and how often in iterations. 0 turns sample grids, or intermediate checkpoints, off."""

    every: Count = 10
    samples_every: CountOrZero = 100
    checkpoint_every: CountOrZero = 100
    keep_checkpoints: Count = 2
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"


class DistillConfig(_Section):
    """One distillation.

    An iteration is `critic_steps` updates of the critic (fake score and discriminator) followed by one update of the
    student; every count of iterations in this file means that.
    """

    method: str = Field(default="f-distill", description="a published method; its settings come before this file's")
    teacher: str = Field(default="digits", description="an embedded teacher, a folder, a hub id, or module:function")
    null_class: CountOrZero | None = Field(
        default=None, description="the teacher's label for `no class`, its last, where its checkpoint does not say it"
    )
    guidance_scale: Positive = Field(default=1.0, description="of the teacher, against its null class; 1 is off")
    vae: str | None = Field(default=None, description="autoencoder of a latent teacher whose folder has none")
    data: str | None = Field(
        default="digits",
        description="embedded; a folder, archive or hf:name; teacher-samples; or null where no method reads images",
    )
    images: ImagesConfig = ImagesConfig()
    divergence: str | None = Field(
        default=None, description="a name, alpha(a), or module:function; null is the method's own"
    )
    student_level: float | list[float] | None = Field(
        default=None, description="level the student starts from, or its 1, 2 or 4 falling levels; null is t_max"
    )
    student: StudentConfig = StudentConfig()
    iterations: Count = 400
    batch_size: Count = Field(default=128, description="over all processes")
    critic_steps: Count = 2
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    generator: GeneratorConfig = GeneratorConfig()
    fake_score: FakeScoreConfig = FakeScoreConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    regression: RegressionConfig = RegressionConfig()
    teacher_samples: TeacherSamplesConfig = TeacherSamplesConfig()
    matching_levels: MatchingLevelsConfig = MatchingLevelsConfig()
    critic_levels: LevelsConfig = LevelsConfig()
    ratio: RatioConfig = RatioConfig()
    ema: EMAConfig = EMAConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _method_settings(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("method", cls.model_fields["method"].default)
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"method: got {name!r}; {did_you_mean(str(name), METHODS)}")
        merged = _merge({"divergence": METHODS[name].divergence, **METHODS[name].settings}, values)
        if merged["divergence"] is None:
            merged["divergence"] = METHODS[name].divergence
        return merged

    @model_validator(mode="after")
    def _fits_the_method(self) -> DistillConfig:
        check_combination(self)
        return self

    @field_validator("student_level", mode="before")
    @classmethod
    def _levels(cls, value: Any) -> Any:
        levels = value if isinstance(value, list) else [] if value is None else [value]
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < math.inf:
                raise ValueError(f"got {value!r}; expected a level above 0, a list of them, or null")
        return [float(level) for level in levels] if isinstance(value, list) else value

    @property
    def student_levels(self) -> tuple[float, ...] | None:
        """`student_level` as a tuple; None for the teacher's t_max."""
        level = self.student_level
        return tuple(level) if isinstance(level, list) else None if level is None else (level,)


class SmokeConfig(_Section):
    """A recipe's smoke section: what `--smoke` makes in place of its teacher and data, and settings that fit those."""

    network: dict[str, Any] = Field(description="_class_name and settings of a tiny network of the teacher's family")
    scheduler: dict[str, Any] | None = Field(
        default=None, description="_class_name and settings of the scheduler beside it"
    )
    vae: dict[str, Any] | None = Field(default=None, description="settings of a latent teacher's AutoencoderKL")
    images: Count = Field(default=16, description="how many, over all classes")
    overrides: dict[str, Any] = Field(default_factory=dict, description="over the recipe's settings")


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


#: Settings that may change when a run is resumed; all others define the run.
RESUMABLE = ("iterations", "device", "log")
_SMOKE = "smoke"  # section of a recipe's file that is no setting of a run


def config_path(name_or_path: str) -> Path:
    """A config file by path, or by the name of one that comes with the package.

    Raises:
        ConfigError: neither exists; the message has the nearest name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    # In an installed package configs/ lies inside it; in a checkout, beside it.
    packaged, checkout = Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"
    folder = packaged if packaged.is_dir() else checkout
    known = {found.stem: found for found in sorted(folder.glob("*.yaml"))}
    if name_or_path in known:
        return known[name_or_path]
    raise ConfigError(
        f"config {name_or_path!r}: no such file, and no config of that name; {did_you_mean(name_or_path, known)}"
    )


def load_config(name_or_path: str | None = None, overrides: Iterable[str] | Mapping[str, Any] = ()) -> DistillConfig:
    """Defaults < YAML file < overrides.

    Args:
        name_or_path: a YAML file, or the name of an embedded config; None for the defaults alone.
        overrides: "section.key=value" strings, the value being YAML (`1e-5`, `[0.98, 0.999]`), or a mapping of dotted
            keys.

    Raises:
        ConfigError: an unknown key (with the nearest one), a wrong type or range, or YAML that cannot be read.
    """
    values = {} if name_or_path is None else _read_file(name_or_path)
    values.pop(_SMOKE, None)
    written_for = values.get("method")
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = []
        for text in overrides:
            key, separator, value = text.partition("=")
            if not separator or not key:
                raise ConfigError(
                    f"override {text!r}: expected key=value, as in divergence=forward-kl or generator.lr=1e-5"
                )
            pairs.append((key, _parse_yaml(value, f"override {text!r}")))
    for key, value in pairs:
        _set(values, key, value)
    if written_for is not None and values["method"] != written_for:
        raise ConfigError(
            f"method: got {values['method']!r}, but the settings of {name_or_path} are for {written_for!r}; choose a "
            f"config for {values['method']!r}, or one that names no method, such as digits"
        )
    return validate(values)


def load_smoke(name_or_path: str) -> SmokeConfig:
    """The smoke section of a config; raises ConfigError where there is none, or one that is wrong."""
    values = _read_file(name_or_path)
    if _SMOKE not in values:
        raise ConfigError(
            f"config {name_or_path!r}: has no smoke section, which says what to run on in place of its teacher and "
            "data; leave --smoke out, or add one as in cifar10-cond"
        )
    try:
        return SmokeConfig.model_validate(values[_SMOKE])
    except ValidationError as error:
        problems = "\n".join(_explain(problem, SmokeConfig) for problem in error.errors())
        raise ConfigError(f"config {name_or_path!r}, smoke: {problems}") from error


def validate(values: Mapping[str, Any]) -> DistillConfig:
    """A config from nested plain values; raises ConfigError for each thing that is wrong, all in one message."""
    try:
        return DistillConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(_explain(problem, DistillConfig) for problem in error.errors())
        raise ConfigError(f"config: {problems}") from error


def dump_config(config: DistillConfig) -> str:
    """The config as YAML that `load_config` reads back to the same config."""
    stream = io.StringIO()
    YAML().dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def changed_keys(old: DistillConfig, new: DistillConfig) -> list[str]:
    """Dotted keys, with both values, in which two configs describe different runs."""
    before, after = _flatten(old.model_dump()), _flatten(new.model_dump())
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.split(".")[0] not in RESUMABLE
    ]


def _read_file(name_or_path: str) -> dict[str, Any]:
    path = config_path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read as UTF-8 text ({error})") from error
    values = _parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {dotted!r}: {parent!r} is not a section")
        values = child
    old = values.get(last)
    if isinstance(old, dict) and isinstance(value, Mapping):
        for key, inner in value.items():  # a section given as a mapping changes what it names, and nothing else
            _set(old, str(key), inner)
    else:
        if callable(value):  # a divergence of one's own: in a config functions have names
            value = f"{value.__module__}:{value.__qualname__}"
        values[last] = str(value) if isinstance(value, Path) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _explain(problem: Any, root: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section = root
        for part in location[:-1]:
            annotation = section.model_fields[part].annotation
            assert isinstance(annotation, type)
            assert issubclass(annotation, BaseModel)
            section = annotation
        return f"{key}: no such setting; {did_you_mean(location[-1], section.model_fields)}"
    if problem["type"] == "literal_error":
        context = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: got {problem['input']!r}; {did_you_mean(str(problem['input']), context)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: got {problem['input']!r}; {message[0].lower()}{message[1:]}"
