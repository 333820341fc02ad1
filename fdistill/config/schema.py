"""The typed description of a distillation: defaults < YAML file < key=value overrides. Imports no torch.

YAML is read by the 1.2 rules, so `1e-5` is a number and `no` is a word.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fdistill.base.errors import ConfigError, did_you_mean
from fdistill.config.sections import (
    CLIPLossConfig,
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
    Positive,
    RatioConfig,
    RegressionConfig,
    Section,
    SmokeConfig,
    StudentConfig,
    TeacherSamplesConfig,
)
from fdistill.methods import METHODS, check_combination


class DistillConfig(Section):
    """One distillation.

    An iteration is `critic_steps` updates of the critic (fake score and discriminator) followed by one update of the
    student; every count of iterations in this file means that.
    """

    method: str = Field(default="f-distill", description="a published method; its settings come before this file's")
    teacher: str = Field(default="digits", description="an embedded teacher, a folder, a hub id, or module:function")
    null_class: CountOrZero | None = Field(
        default=None, description="the teacher's label for `no class`, its last, where its checkpoint does not say it"
    )
    teacher_base: str | None = Field(
        default=None, description="the published pipeline that a single-file teacher was made from: a folder or hub id"
    )
    teacher_lora: str | None = Field(default=None, description="a LoRA file that is merged into the teacher")
    teacher_lora_scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    guidance_scale: Positive = Field(
        default=1.0, description="of the teacher, against its null class or negative_prompt; 1 is off"
    )
    guidance_rescale: Fraction = Field(
        default=0.0, description="how far the norm of a guided prediction is brought back to the conditional one's"
    )
    negative_prompt: str = Field(default="", description="what guidance of a text-to-image teacher leads away from")
    condition_dropout: Fraction = Field(
        default=0.0, description="share of the critic's labels or prompts that are replaced by `none`"
    )
    resolution: Count | None = Field(
        default=None, description="of a text-to-image student's images, in pixels; null is the teacher's"
    )
    vae: str | None = Field(default=None, description="autoencoder of a latent teacher whose folder has none")
    data: str | None = Field(
        default="digits",
        description="embedded; a folder, archive or hf:name; teacher-samples; or null where no method reads images",
    )
    prompts: str | None = Field(
        default=None, description="a file with a prompt a line, for a text-to-image teacher without captioned images"
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
    frozen_precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="in which weights that are not trained are held: the teacher's, text encoders'"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for a fifth more time, or a third")
    generator: GeneratorConfig = GeneratorConfig()
    fake_score: FakeScoreConfig = FakeScoreConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    regression: RegressionConfig = RegressionConfig()
    clip_loss: CLIPLossConfig = CLIPLossConfig()
    teacher_samples: TeacherSamplesConfig = TeacherSamplesConfig()
    matching_levels: MatchingLevelsConfig = MatchingLevelsConfig()
    critic_levels: LevelsConfig = LevelsConfig()
    ratio: RatioConfig = RatioConfig()
    ema: EMAConfig = EMAConfig()
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


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


#: Settings that may change when a run is resumed; all others define the run.
RESUMABLE = ("iterations", "device", "log", "eval")
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
    package = Path(__file__).parent.parent
    packaged, checkout = package / "configs", package.parent / "configs"
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
