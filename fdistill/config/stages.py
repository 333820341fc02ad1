"""The stages of a run: which settings a stage may change, and the settings of a stage. Imports no torch.

Each function raises ValueError, whose text becomes one line of a ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fdistill.base.errors import shown
from fdistill.config.combinations import method_settings
from fdistill.config.limits import MAX_COUNT, MAX_STAGES
from fdistill.config.nested import leaves, merged
from fdistill.config.plain_yaml import MAX_DEPTH
from fdistill.config.sections import (
    DiscriminatorConfig,
    GeneratorConfig,
    LevelsConfig,
    OptimizerConfig,
    RatioConfig,
)
from fdistill.config.terms import AugmentationConfig
from fdistill.methods import METHODS, Method

_OPTIMIZER = set(OptimizerConfig.model_fields) - {"optimizer"}

#: What a stage may change: a section's settings by name, or None for a setting that stands alone or has any name.
#: Networks, data and batches are the run's: nothing that shapes them is here.
CHANGEABLE: dict[str, set[str] | None] = {
    "method": None,
    "divergence": None,
    "critic_steps": None,
    "reuse_samples": None,
    "objective": None,
    "generator": set(GeneratorConfig.model_fields) - {"optimizer"},
    "fake_score": _OPTIMIZER | {"micro_batch", "weighting", "min_snr_gamma", "alignment"},
    "discriminator": _OPTIMIZER | {"gan_weight", "gan_weighting", "r1_weight", "r1", "r1_sigma"},
    "regression": {"weight"},
    "augmentation": set(AugmentationConfig.model_fields),
    "diversity": {"weight"},
    "segment": {"weight"},
    "clip_loss": {"weight", "gradient_ratio"},
    "reward": {"weight", "gradient_ratio"},
    "student": {"noise_kl_weight"},
    "matching_levels": set(LevelsConfig.model_fields),
    "critic_levels": set(LevelsConfig.model_fields),
    "ratio": set(RatioConfig.model_fields) - {"num_bins", "bin_edges"},
    "ema": {"decays"},
}


def read_stages(given: Any) -> list[dict[str, Any]]:
    """Stages as they are written -> the same with nested settings instead of dotted ones, each with its iterations."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(
            f"stages: got {shown(given)}; expected a list such as [{{iterations: 100}}, {{iterations: 50}}]"
        )
    if len(given) > MAX_STAGES:
        raise ValueError(f"stages: got {len(given):,}; expected at most {MAX_STAGES:,}")
    found = []
    for number, stage in enumerate(given, 1):
        if not isinstance(stage, Mapping):
            raise ValueError(
                f"stage {number}: got {shown(stage)}; expected iterations and the settings that it changes"
            )
        count = stage.get("iterations")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
            raise ValueError(
                f"stage {number}: iterations: got {shown(count)}; expected how many it has, at least 1 and at most "
                f"{MAX_COUNT:,}"
            )
        nested: dict[str, Any] = {}
        for key, value in stage.items():
            parts = str(key).split(".")
            if len(parts) > MAX_DEPTH:
                raise ValueError(f"stage {number}: {shown(key)}: no such setting")
            for part in reversed(parts):
                value = {part: value}
            nested = merged(nested, value)
        found.append(nested)
    return found


def stage_values(base: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stage: the base config's with the stage's changes.

    A stage with another method also gets that method's settings, and what the method does not read is turned off.

    Args:
        base: the resolved settings of the run, all of them.
        stage: iterations and changes, nested.
    """
    for key, _ in leaves(stage):
        if key != "iterations":
            _check_changeable(key, base)
    values = {key: value for key, value in base.items() if key != "stages"}
    name = stage.get("method", base["method"])
    if name in METHODS and name != base["method"]:
        values = _with_method(values, name)
    generator = stage.get("generator")
    if isinstance(generator, Mapping) and "gan_weight" in generator:  # a weight that is given is not balanced
        values = merged(values, {"generator": {"gan_gradient_ratio": 0.0}})
    values = merged(values, stage)
    return {**values, "ema": _averages(base["ema"], values["ema"])}


def _averages(run: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's section about averages, in which the exported one is named by its decay in the stage.

    Raises:
        ValueError: the stage has not a decay for each of the run's averages.
    """
    if stage["decays"] == run["decays"]:
        return dict(stage)
    if not isinstance(stage["decays"], list) or len(stage["decays"]) != len(run["decays"]):
        expected = f"a decay for each of the run's averages {run['decays']}"
        if not run["decays"]:
            expected = "none: the run's averages have widths (ema.sigma_rel), which no stage changes"
        raise ValueError(f"ema.decays: got {stage['decays']!r}; expected {expected}")
    decays = dict(zip(run["decays"], stage["decays"], strict=True))
    return {**stage, "export": decays.get(run["export"], run["export"])}


def check_alike(methods: Sequence[str]) -> None:
    """Checks that the methods of a run's stages train the same networks."""
    critics = [name for name in methods if METHODS[name].critic is not None]
    for name in critics:
        if METHODS[name].scores != METHODS[critics[0]].scores:
            raise ValueError(
                f"stages: methods {critics[0]} and {name} train different parts of the fake score's network; expected "
                "methods that all have a score network, or the same method in all stages"
            )


def _is_changeable(key: str) -> bool:
    section, _, name = key.partition(".")
    if section not in CHANGEABLE:
        return False
    names = CHANGEABLE[section]
    return names is None or not name or name in names


def _check_changeable(key: str, base: Mapping[str, Any]) -> None:
    """Refuses a setting of the run that no stage may change; a name that is no setting is left to the schema."""
    section, _, name = key.partition(".")
    inner = base.get(section)
    known = name.split(".")[0] in inner if isinstance(inner, Mapping) and name else section in base
    if known and not _is_changeable(key):
        raise ValueError(
            f"{key}: cannot change during a run, because it shapes networks, data, batches or output; set it for the "
            "run and leave it out here"
        )


def _with_method(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings with another method and its row's settings, and without those that it does not read."""
    before, method = METHODS[str(values["method"])], METHODS[name]
    for key, value in leaves(method.settings):
        section, _, inner = key.partition(".")
        own = values[section][inner] if inner else values[section]
        if not _is_changeable(key) and own != value:
            raise ValueError(
                f"method: {name} comes with {key}={value!r} and the run has {own!r}, which cannot change during a run; "
                f"set {key} for the run, or name in this stage the losses that change"
            )
    if not method.discriminator:
        # The run's heads stay as they are, untrained and unread; a config without a discriminator has the defaults.
        kept = {key: value for key, value in values["discriminator"].items() if key in OptimizerConfig.model_fields}
        values = {**values, "discriminator": {**DiscriminatorConfig().model_dump(), **kept}}
    values = merged({**values, "objective": {}}, _turned_off(before, method))
    fixed = values["generator"] if values["generator"]["gan_weight"] != GeneratorConfig().gan_weight else {}
    return merged({**values, "method": name, "divergence": method.divergence}, method_settings(name, fixed))


def _turned_off(before: Method, method: Method) -> dict[str, Any]:
    """The settings that turn off what `method` does not read, and turn on the GAN that the method `before` had not."""
    generator, discriminator = GeneratorConfig(), DiscriminatorConfig()
    found: dict[str, Any] = {"generator": {}}
    if not method.discriminator:
        found["generator"] |= {"gan_weight": 0.0, "gan_gradient_ratio": 0.0}
        found["discriminator"] = {"gan_weight": 0.0}
    elif not before.discriminator:
        found["generator"] |= {"gan_weight": generator.gan_weight}
        found["discriminator"] = {"gan_weight": discriminator.gan_weight}
    if not method.weighting:
        found["generator"] |= {"weighting": generator.weighting}
    if not method.pairs:
        found["regression"] = {"weight": 0.0}
    if not method.extra_terms:
        found["generator"] |= {"gan_gradient_ratio": 0.0, "normaliser_floor": generator.normaliser_floor}
        found |= {"student": {"noise_kl_weight": 0.0}, "augmentation": {"weight": 0.0}}
        found |= {"diversity": {"weight": 0.0}, "segment": {"weight": 0.0}}
        found |= {term: {"weight": 0.0, "gradient_ratio": 0.0} for term in ("clip_loss", "reward")}
    if "augmentation" in before.settings and "augmentation" not in method.settings:
        found["augmentation"] = {"weight": 0.0}
    if method.critic is None:
        found["reuse_samples"] = False
    if method.critic is None or not method.scores:
        found |= {"condition_dropout": 0.0, "fake_score": {"alignment": 0.0}}
    return found
