"""The model card of a published student: the card in its folder, filled with metadata, pictures and scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdistill.base.errors import CheckpointError
from fdistill.sharing.licence import Licence
from fdistill.sharing.scores import Score

#: The teacher's samples, beside those of the student: the same noise, classes and prompts.
TEACHER_SAMPLES = "teacher_samples.png"
_HERE = "path/to/this/folder"
_PICTURE = "![Samples](samples.png)\n"
_TRAINING = "\n## Training\n"


@dataclass(frozen=True)
class CardFacts:
    """What a published card says beside the text of the card in the student's folder.

    Attributes:
        repo_id: the id on the hub, for the code that loads the student.
        text_to_image: whether the student draws from prompts.
        in_diffusers: whether the folder is a pipeline of diffusers.
        method: the method that trained it; empty if it is not known.
        base_models: hub ids of what it was made of.
        licence: what it is published under.
        scores: what was measured of these weights.
        beside_teacher: whether the teacher's samples are published as well.
    """

    repo_id: str
    text_to_image: bool
    in_diffusers: bool
    method: str
    base_models: Sequence[str]
    licence: Licence
    scores: Sequence[Score]
    beside_teacher: bool


def public_card(text: str, facts: CardFacts) -> str:
    """The README.md to publish. What the user has written into the card, text or metadata, stays.

    Args:
        text: the card in the student's folder, without paths of the user's disk.

    Raises:
        CheckpointError: the metadata at the head of the card cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except Exception as error:  # of the YAML library as well
        raise CheckpointError(
            f"README.md: the metadata at its head cannot be read ({' '.join(str(error).split())[:200]}); mend it, or "
            "copy the student's folder again"
        ) from error
    data: Any = card.data
    metadata: dict[str, Any] = data.to_dict()
    metadata |= facts.licence.metadata | {"pipeline_tag": _task(facts)}
    if facts.in_diffusers:
        metadata["library_name"] = "diffusers"
    else:
        metadata.pop("library_name", None)
    tags = ["diffusers"] * facts.in_diffusers + ["one-step", "distillation", "fdistill", facts.method]
    metadata["tags"] = [tag for tag in dict.fromkeys([*metadata.get("tags", []), *tags]) if tag]
    if facts.base_models:
        metadata["base_model"] = facts.base_models[0] if len(facts.base_models) == 1 else list(facts.base_models)
    metadata |= _model_index(facts)
    return f"---\n{_yaml(metadata)}---\n{_body(card.text, facts)}"


def _task(facts: CardFacts) -> str:
    return "text-to-image" if facts.text_to_image else "unconditional-image-generation"


def _model_index(facts: CardFacts) -> dict[str, Any]:
    """The scores as the hub reads them, by protocol and reference; nothing where there are none."""
    from huggingface_hub import EvalResult, ModelCardData

    if not facts.scores:
        return {}
    results = [
        EvalResult(
            task_type=_task(facts),
            dataset_type=score.protocol,
            dataset_name=score.protocol + (f" against {score.against}" if score.against else ""),
            metric_type=re.split(r"[@ ]", score.name)[0],
            metric_name=score.name,
            metric_value=score.value,
        )
        for score in facts.scores
    ]
    made: Any = ModelCardData(model_name=facts.repo_id.split("/")[-1], eval_results=results)
    return {"model-index": made.to_dict()["model-index"]}


def _yaml(metadata: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    return f"{ModelCardData(**metadata).to_yaml()}\n"


def _body(text: str, facts: CardFacts) -> str:
    text = text.replace(_HERE, facts.repo_id)
    if facts.beside_teacher:
        pictures = f"| teacher | student |\n|---|---|\n| ![Teacher]({TEACHER_SAMPLES}) | ![Student](samples.png) |\n"
        text = text.replace(_PICTURE, pictures)
    return _before_training(text, _licence(facts) + _scores(facts.scores))


def _before_training(text: str, sections: str) -> str:
    before, heading, after = text.partition(_TRAINING)
    return f"{before.rstrip()}\n{sections}{heading}{after}"


def _licence(facts: CardFacts) -> str:
    of = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in facts.base_models)
    made = f" It was distilled from {of}." if of else ""
    return f"\n## Licence\n\nThis student is published under {facts.licence} ({facts.licence.source}).{made}\n"


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = "".join(
        f"| {score.name} | {score.value:.4g}{f' +- {score.spread}' if score.spread else ''} | {score.protocol} | "
        f"{score.against or 'see the protocol'} |\n"
        for score in scores
    )
    return (
        "\n## Scores\n\nMeasured with `fdistill evaluate`, by its named protocols.\n\n"
        f"| score | value | protocol | against |\n|---|---|---|---|\n{rows}"
    )


def own_card(folder: Path) -> str:
    """The card in a student's folder; CheckpointError if it cannot be read."""
    path = folder / "README.md"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the student's folder again") from error
