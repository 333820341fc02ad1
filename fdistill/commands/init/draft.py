"""A config in the making: a recipe's settings, those that an answer changed, and why. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fdistill.config.reading import validate
from fdistill.config.schema import DistillConfig
from fdistill.methods import METHODS

_SMOKE = "smoke"


@dataclass
class Draft:
    """Settings, nested as in a file.

    Attributes:
        recipe: name of the recipe that they come from.
        values: the settings, with the smoke section.
        reasons: dotted name -> why it has its value, of those that were chosen here.
        memory: a sentence about memory.
        before: commands to run before the config can be used.
    """

    recipe: str
    values: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    memory: str = ""
    before: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: str, values: Mapping[str, Any]) -> Draft:
        """A recipe's own settings."""
        return cls(recipe, copy.deepcopy(dict(values)))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted name."""
        section, _, name = key.rpartition(".")
        found = self.values.get(section, {}) if section else self.values
        return found.get(name, default)

    def put(self, key: str, value: Any, why: str) -> None:
        """Sets a dotted name. A section that is put as a whole replaces the one there."""
        section, _, name = key.rpartition(".")
        (self.values.setdefault(section, {}) if section else self.values)[name] = value
        self.reasons[key] = why

    def explain(self, key: str, why: str) -> None:
        """Says why a setting keeps the recipe's value."""
        self.reasons[key] = why

    def leave_out(self, *keys: str) -> None:
        """Removes dotted names, so that their defaults hold, and sections that are empty then."""
        for key in keys:
            section, _, name = key.rpartition(".")
            found = self.values.get(section, {}) if section else self.values
            found.pop(name, None)
            self.reasons.pop(key, None)
            if section and not found:
                self.values.pop(section, None)

    def config(self) -> DistillConfig:
        """The settings as a config; raises ConfigError where they do not go together."""
        return validate({key: value for key, value in self.values.items() if key != _SMOKE})

    @property
    def method(self) -> str:
        """Its method's name."""
        return str(self.get("method", "f-distill"))

    @property
    def trains_heads(self) -> bool:
        """Whether a discriminator is trained, which has to see images."""
        if not METHODS[self.method].discriminator:
            return False
        default = METHODS[self.method].settings.get("discriminator", {}).get("gan_weight", 1.0)
        return bool(self.get("discriminator.gan_weight", default))
