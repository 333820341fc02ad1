"""A draft as YAML, in which a comment says of each setting why it has its value. Imports no torch."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from fdistill.commands.init.draft import Draft
from fdistill.commands.recipe_heads import origin
from fdistill.config.nested import leaves
from fdistill.config.plain_yaml import parse_yaml
from fdistill.config.reading import config_path
from fdistill.config.schema import DistillConfig

_WIDTH = 110
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
_NOT_PLAIN = {"null", "true", "false", "yes", "no", "on", "off", "nan", "inf"}
#: What settings are for, where no answer has decided them.
_PURPOSES = {
    "method": "What the student learns from; `fdistill methods` lists the others.",
    "divergence": "How far student and teacher are apart is measured by this; `fdistill divergences` lists the others.",
    "guidance_scale": "The student learns the teacher under this guidance, and needs none itself.",
    "negative_prompt": "The guidance leads away from this.",
    "resolution": "Images of this size need less memory than the teacher's largest.",
    "student_level": "The noise levels of the student's steps.",
    "student": "The student's network and steps.",
    "iterations": "How long the run is: stop it when the scores do (docs/runs.md), or go on with --resume.",
    "stages": "The run begins with a warm-up, because the student is far from the teacher at first.",
    "batch_size": "Samples in an update, over all GPUs.",
    "critic_steps": "The critic has to keep up with the student, so it is updated so often for each of its updates.",
    "precision": "Networks compute in this precision; what is trained stays in fp32.",
    "frozen_precision": "Weights that are not trained need less precision, and less memory.",
    "gradient_checkpointing": "Activations are computed again, which takes less memory and more time.",
    "generator": "The student's optimiser and loss; the rates are the recipe's.",
    "fake_score": "The fake score learns what the student makes, so it has to learn faster than the student changes.",
    "discriminator": "It tells real images from the student's, which gives the density ratio and a GAN term.",
    "objective": "Numbers of the method's own formula.",
    "regression": "How many pairs of noise and the teacher's image the warm-up learns from.",
    "augmentation": "Guidance is a term of its own, at levels cleaner than the student's input.",
    "teacher_samples": "How the teacher draws its samples.",
    "matching_levels": "Levels at which scores are compared; at the ends their difference says little.",
    "critic_levels": "Levels at which the critic learns.",
    "ratio": "Bounds and bins of the density ratio, without which a few samples would rule an update.",
    "ema": "An average of the student's weights is exported: it is better than the last weights.",
    "log": "How often the run writes numbers, grids of samples and checkpoints.",
}


def as_yaml(draft: Draft, answers: Mapping[str, str], commands: list[list[str]]) -> str:
    """The file's text.

    Args:
        answers: question -> answer, for the comment at the top.
        commands: to run next, for the same comment.
    """
    recipe = config_path(draft.recipe).read_text(encoding="utf-8")
    said = ", ".join(f"{name} {answer}" for name, answer in answers.items())
    head = [
        *_comment(f"Written by `fdistill init` for these answers: {said}."),
        *_comment(
            f"It starts from the recipe {draft.recipe} (`fdistill configs`). Behind a value stands where that recipe "
            "has it from; a sentence above it says why it was chosen for you, or what it is for."
        ),
        *_comment(f"Memory: {draft.memory}"),
        "# Next:",
        *(f"#   {shlex.join(command)}" for command in commands),
    ]
    known = [key for key in DistillConfig.model_fields if key in draft.values]
    sections = [line for key in known for line in _setting(draft, key, recipe)]
    return "\n".join([*head, *sections, *_smoke(draft)]) + "\n"


def _setting(draft: Draft, key: str, recipe: str) -> Iterator[str]:
    value = draft.values[key]
    yield ""
    why = draft.reasons.get(key) or _PURPOSES.get(key) or f"As in the recipe {draft.recipe}."
    yield from _comment(why)
    if not isinstance(value, Mapping):
        yield _with_origin(f"{key}: {_flow(value)}", _origin(draft, key, recipe), "")
        return
    yield f"{key}:"
    for name, inner in value.items():
        reason = draft.reasons.get(f"{key}.{name}")
        if reason is not None:
            yield from _comment(reason, "  ")
        found = "" if reason is not None or key in draft.reasons else _origin(draft, f"{key}.{name}", recipe)
        yield _with_origin(f"  {name}: {_flow(inner)}", found, "  ")


def _origin(draft: Draft, key: str, recipe: str) -> str:
    """Where the recipe has a value from; "" where it is not the recipe's value any more."""
    theirs = dict(leaves(parse_yaml(recipe, draft.recipe)))
    mine = dict(leaves(draft.values))
    return origin(recipe, key) if key in theirs and theirs[key] == mine.get(key) else ""


def _with_origin(line: str, found: str, indent: str) -> str:
    if not found:
        return line
    whole = f"{line}  # {found}"
    return whole if len(whole) <= _WIDTH else "\n".join([*_comment(found, indent), line])


def _smoke(draft: Draft) -> Iterator[str]:
    if "smoke" not in draft.values:
        return
    yield ""
    yield from _comment(
        "For --smoke alone: a tiny network of the same family, with which the run is tried in a minute."
    )
    yield "smoke:"
    for key, value in draft.values["smoke"].items():
        yield f"  {key}: {_flow(value)}"


def _comment(text: str, indent: str = "") -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_long_words=False, break_on_hyphens=False
    )


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    return json.dumps(value, ensure_ascii=False)
