"""Reads configs from files and overrides: defaults < YAML file < key=value. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from fdistill.base.errors import ConfigError, did_you_mean, shown
from fdistill.base.reading import not_here
from fdistill.config.nested import leaves
from fdistill.config.plain_yaml import MAX_CHARACTERS, MAX_DEPTH, parse_yaml
from fdistill.config.problems import explain
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import SmokeConfig

#: Settings that may change when a run is resumed, and settings of each trained role; all others define the run.
RESUMABLE = (
    "iterations",
    "device",
    "parallel",
    "offload_frozen",
    "offload_optimizers",
    "max_skipped",
    "log",
    "eval",
)
RESUMABLE_OF_ROLES = ("lr", "grad_clip")
_SMOKE = "smoke"  # section of a recipe's file that does not belong to a run's settings


def config_path(name_or_path: str | Path) -> Path:
    """Finds a config file by its path, or by the name of a config that comes with the package.

    Raises:
        ConfigError: neither exists; the message suggests the nearest name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = {found.stem: found for found in embedded_configs()}
    name = str(name_or_path)
    if name in known:
        return known[name]
    special = not_here(path, "")
    if special:
        raise ConfigError(f"config {name!r}: {special}; expected a YAML file, or the name of a config such as digits")
    raise ConfigError(f"config {name!r}: no such file, and no config of that name; {did_you_mean(name, known)}")


def embedded_configs() -> list[Path]:
    """The configs that come with the package, sorted by name."""
    # In an installed package configs/ lies inside it; in a checkout, beside it.
    package = Path(__file__).parent.parent
    packaged, checkout = package / "configs", package.parent / "configs"
    found = (packaged if packaged.is_dir() else checkout).glob("*.yaml")
    return sorted(found, key=lambda path: path.stem)


def load_config(
    name_or_path: str | Path | None = None, overrides: Iterable[str] | Mapping[str, Any] = ()
) -> DistillConfig:
    """Loads a config; overrides win over the YAML file, which wins over the defaults.

    Args:
        name_or_path: a YAML file, or the name of a config that comes with the package; None for only the defaults.
        overrides: "section.key=value" strings, whose values are YAML (`1e-5`, `[0.98, 0.999]`), or a mapping of dotted
            keys to values.

    Raises:
        ConfigError: a key is unknown (the message suggests the nearest one), a value has the wrong type or range, or
            the YAML cannot be read, see `parse_yaml`.
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
                    f"override {shown(text)}: expected key=value, as in divergence=forward-kl or generator.lr=1e-5"
                )
            pairs.append((key, parse_yaml(value, f"override {shown(text)}")))
    given = {key for key, _ in pairs}
    if "stages" in given and "iterations" not in given:
        values.pop("iterations", None)  # the file's, of a run without these stages
    for key, value in pairs:
        _set(values, key, value)
    if written_for is not None and values["method"] != written_for:
        raise ConfigError(
            f"method: got {values['method']!r}, but the settings of {name_or_path} are for {written_for!r}; choose a "
            f"config for {values['method']!r}, or one that names no method, such as digits"
        )
    return validate(values)


def load_smoke(name_or_path: str) -> SmokeConfig:
    """Loads the smoke section of a config; raises ConfigError if it is missing or wrong."""
    values = _read_file(name_or_path)
    if _SMOKE not in values:
        raise ConfigError(
            f"config {name_or_path!r}: has no smoke section, which says what to run on in place of its teacher and "
            "data; leave --smoke out, or add one as in cifar10-cond"
        )
    try:
        return SmokeConfig.model_validate(values[_SMOKE])
    except ValidationError as error:
        problems = "\n".join(explain(problem, SmokeConfig) for problem in error.errors())
        raise ConfigError(f"config {name_or_path!r}, smoke: {problems}") from error


def validate(values: Mapping[str, Any]) -> DistillConfig:
    """Builds a config from nested plain values; raises one ConfigError that lists everything that is wrong."""
    try:
        return DistillConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(explain(problem, DistillConfig) for problem in error.errors())
        raise ConfigError(f"config: {problems}") from error


def dump_config(config: DistillConfig) -> str:
    """The config as YAML that `load_config` reads back to the same config."""
    stream = io.StringIO()
    YAML().dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def changed_keys(old: DistillConfig, new: DistillConfig) -> list[str]:
    """The dotted keys, with both values, that make two configs describe different runs.

    A longer run is the same run, except where a learning rate falls to the end.
    """
    falls = any(section.needs_the_end for section in old.roles.values())
    return [
        f"{key}: {before!r} -> {after!r}"
        for key, (before, after) in changes(old, new).items()
        if not _is_resumable(key) or (falls and key == "iterations")
    ]


def changes(old: DistillConfig, new: DistillConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of the settings that differ; those of stages are `stage 1.generator.lr`."""
    before, after = _settings(old), _settings(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _settings(config: DistillConfig) -> dict[str, Any]:
    found = dict(leaves(config.model_dump(exclude={"stages"})))
    for number, stage in enumerate(config.stages, 1):
        found.update(leaves(stage, f"stage {number}."))
    return found


def _is_resumable(key: str) -> bool:
    """Whether a setting, or a stage's setting, may change when a run is resumed. The length of a stage may not."""
    section, _, rest = key.partition(".")
    in_stage = section.startswith("stage ")
    role, _, name = (rest if in_stage else key).partition(".")
    of_role = role in ("generator", "fake_score", "discriminator") and name in RESUMABLE_OF_ROLES
    return of_role or (not in_stage and section in RESUMABLE)


def _read_file(name_or_path: str | Path) -> dict[str, Any]:
    path = config_path(name_or_path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read as UTF-8 text ({error})") from error
    values = parse_yaml(text, str(path))
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"override {shown(dotted)}: no such setting; expected at most {MAX_DEPTH} parts")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {dotted!r}: {parent!r} is not a section")
        values = child
    old = values.get(last)
    if isinstance(old, dict) and isinstance(value, Mapping):
        for key, inner in value.items():  # a section given as a mapping changes only the keys that it names
            _set(old, str(key), inner)
    else:
        if callable(value):  # a custom divergence: a config stores functions by name
            value = f"{value.__module__}:{value.__qualname__}"
        values[last] = str(value) if isinstance(value, Path) else value
