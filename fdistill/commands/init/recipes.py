"""Which of the package's recipes is nearest to a teacher and to a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fdistill.adapters import FAMILIES
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.commands.init.answers import Hardware
from fdistill.commands.init.teachers import TeacherAnswer
from fdistill.commands.recipe_heads import paragraphs
from fdistill.config.plain_yaml import parse_yaml
from fdistill.config.reading import config_path, embedded_configs

#: For families without a recipe: pixels with EDM's levels, and text-to-image flows, as any transformer has these heads.
_GENERAL = ("cifar10-cond", "sd35-medium")
_SMALL = 32  # GB; up to here recipes for 24 GB are tried
_HARDWARE = re.compile(r"(one|\d+) GPUs? of (\d+) GB")


@dataclass(frozen=True)
class Recipe:
    """A config that comes with the package.

    Attributes:
        text: of its file.
        values: its settings, with its smoke section.
    """

    name: str
    text: str
    values: Mapping[str, Any]

    @property
    def smoke(self) -> Mapping[str, Any]:
        """What it says of a tiny network of its family; empty for the recipes of embedded teachers."""
        found: Mapping[str, Any] = self.values.get("smoke", {})
        return found

    @property
    def pipeline(self) -> str | None:
        """Class of its teacher's pipeline, if that takes prompts."""
        return self.smoke.get("pipeline")

    @property
    def network(self) -> str:
        """Class of its teacher's network."""
        if self.pipeline is None:
            return str(self.smoke.get("network", {}).get("_class_name", ""))
        families = ((name, family.text) for name, family in FAMILIES.items())
        return next((name for name, text in families if text and self.pipeline in text.pipelines), "")

    @property
    def levels(self) -> str:
        """What its noise levels are, told by how large they are: flow, sigma or timesteps."""
        level = self.values["student_level"]
        first = level[0] if isinstance(level, list) else level
        return "flow" if first <= 1 else "sigma" if first <= 100 else "timesteps"

    @property
    def gpus(self) -> int:
        """How many GPUs its batch is for; 1 for a CPU."""
        hardware = next((part.text for part in paragraphs(self.text) if part.heading == "Hardware"), "")
        match = _HARDWARE.search(hardware)
        return 1 if match is None or match[1] == "one" else int(match[1])

    @property
    def is_small(self) -> bool:
        """Whether it is for a GPU of 24 GB."""
        return self.name.endswith("-24gb")

    @property
    def has_adapters(self) -> bool:
        """Whether its student is a LoRA."""
        return bool(self.values.get("student", {}).get("lora_rank"))


def nearest_recipe(teacher: TeacherAnswer, hardware: Hardware, goal: str) -> Recipe:
    """The recipe of this teacher, of its family, or else of the same kind of noise levels; for GPUs like these."""
    if teacher.name in EMBEDDED_TEACHERS:
        return _read(teacher.name)
    recipes = [recipe for recipe in map(_read, (path.stem for path in embedded_configs())) if recipe.smoke]
    same_input = [recipe for recipe in recipes if (recipe.pipeline is not None) == teacher.takes_prompts]
    small = hardware.gpus > 0 and hardware.gigabytes <= _SMALL

    def distance(recipe: Recipe) -> tuple[object, ...]:
        differing, shared = _compared(recipe, teacher)
        return (
            recipe.values["teacher"] not in (teacher.name, teacher.base),
            recipe.levels != teacher.levels if recipe.pipeline is None else recipe.pipeline != teacher.pipeline,
            recipe.network != teacher.network,
            recipe.levels != teacher.levels,
            recipe.network != teacher.network and recipe.name not in _GENERAL,
            differing,
            -shared,
            goal == "lora" and not recipe.has_adapters,
            recipe.is_small != small,
            recipe.name,
        )

    return min(same_input, key=distance)


def is_of(recipe: Recipe, teacher: TeacherAnswer) -> bool:
    """Whether a recipe's own teacher is of the same family."""
    return teacher.name in EMBEDDED_TEACHERS or recipe.network == teacher.network


def _read(name: str) -> Recipe:
    text = config_path(name).read_text(encoding="utf-8")
    return Recipe(name, text, parse_yaml(text, name))


def _compared(recipe: Recipe, teacher: TeacherAnswer) -> tuple[int, int]:
    """How many settings of the recipe's tiny network and scheduler differ from the teacher's in kind, and how many do
    not. Words are compared, and of numbers whether they are zero, since a tiny network is smaller.
    """
    pairs = [
        (mine, theirs.get(key))
        for ours, theirs in (
            (recipe.smoke.get("network", {}), teacher.settings),
            (recipe.smoke.get("scheduler", {}), teacher.scheduler),
        )
        for key, mine in ours.items()
        if key != "_class_name"
    ]
    alike = [_alike(mine, theirs) for mine, theirs in pairs if isinstance(mine, (str, int, float))]
    labels = bool(recipe.smoke.get("network", {}).get("label_dim")) == bool(teacher.denoiser.num_classes)
    return alike.count(False) + (not labels), alike.count(True)


def _alike(mine: Any, theirs: Any) -> bool:
    return mine == theirs if isinstance(mine, str) else bool(mine) == bool(theirs)
