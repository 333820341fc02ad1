"""A student as it is published: its files, licence and card, with nothing private in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdistill.adapters.hub import id_and_revision, is_hub_id
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import weights_sha256
from fdistill.sharing.card import TEACHER_SAMPLES, CardFacts, own_card, public_card
from fdistill.sharing.files import CARD, CONFIG, SAMPLES, Content, config_text, public_files, training_config
from fdistill.sharing.licence import Licence, licence_for
from fdistill.sharing.private import located, private_texts, public_text, replaced
from fdistill.sharing.scores import Score, own_scores, scores_of_files
from fdistill.students.folder import checked_facts, find_student

#: The folders of a run that hold students, whose sample grids have the noise of samples/teacher.png.
_OF_A_RUN = ("student", "best")
_UNKNOWN = "unknown"  # what `fdistill convert` writes where nothing names the teacher


@dataclass(frozen=True)
class Publication:
    """What would be uploaded.

    Attributes:
        files: {path in the repository: a file on the disk, or its content}.
        licence: what it is published under.
        base_models: hub ids of what it was made of.
        scores: those that the card says.
        notes: sentences that the user should read first.
    """

    files: dict[str, Content]
    licence: Licence
    base_models: list[str]
    scores: list[Score]
    notes: list[str]

    def sizes(self) -> dict[str, int]:
        """{path in the repository: bytes}."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def prepare(run: Path, repo_id: str, scores: Sequence[Path] = (), licence: str | None = None) -> Publication:
    """Gathers what a student's folder consists of, and fills its card.

    Args:
        run: a run folder or a student folder.
        repo_id: "user/name".
        scores: files of `fdistill evaluate --output`; without any, the scores are those of the run's own record.
        licence: an identifier of the hub; None for the teacher's own licence.

    Raises:
        CheckpointError: there is no student, or a file of it is damaged.
        ArgumentError: the id is none, no licence is known, or the scores are another student's.
    """
    _check_id(repo_id)
    folder = find_student(run)
    if folder is None:
        raise CheckpointError(
            f"student {str(run)!r}: holds no student; expected a folder that `fdistill distill` wrote, or a student's"
        )
    facts = checked_facts(folder)
    text, config = training_config(folder)
    texts = private_texts(facts, folder) | private_texts(config, folder)
    origins = _origins(facts)
    chosen, notes = licence_for(origins, folder, licence)
    files = public_files(folder, facts, texts)
    # Of the folder, not of the files: configs may lose paths, weights stay as they are.
    measured = scores_of_files(scores, weights_sha256(folder), folder) if scores else own_scores(facts, config, folder)
    beside = _teacher_samples(folder) if SAMPLES in files else None
    bases = [id_and_revision(name)[0] for name in origins if _is_base_model(name, folder)]
    card = own_card(folder)
    if config:
        files[CONFIG] = (public_config := config_text(replaced(config, texts))).encode()
        card = card.replace(text.strip(), public_config.strip())
    about = CardFacts(
        repo_id,
        text_to_image="size" in facts,
        in_diffusers="model_index.json" in files,
        method=str(facts.get("method", "")),
        base_models=bases,
        licence=chosen,
        scores=measured,
        beside_teacher=beside is not None,
    )
    files[CARD] = public_card(public_text(card, folder, texts), about).encode()
    files |= {} if beside is None else {TEACHER_SAMPLES: beside}
    return Publication(files, chosen, bases, measured, [*notes, *_left_out(folder, files), *_of_best(folder)])


def _check_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") == 1:
            return
    except HFValidationError:
        pass
    raise ArgumentError(
        f"repository {repo_id!r}: expected user/name or organisation/name, of letters, digits, '-', '_' and '.'"
    )


def _origins(facts: Mapping[str, Any]) -> list[str]:
    """What a student was made of: the teacher whose distribution it learnt, and where its weights started."""
    named = [facts.get(key) for key in ("teacher", "started_from")]
    return [name for name in dict.fromkeys(named) if isinstance(name, str) and name not in ("", _UNKNOWN)]


def _is_base_model(name: str, folder: Path) -> bool:
    return name not in EMBEDDED_TEACHERS and ":" not in name and is_hub_id(name) and located(name, folder) is None


def _teacher_samples(folder: Path) -> Path | None:
    run = folder.absolute().parent
    path = run / "samples" / "teacher.png"
    return path if folder.absolute().name in _OF_A_RUN and (run / "config.yaml").is_file() and path.is_file() else None


def _left_out(folder: Path, files: Mapping[str, Content]) -> list[str]:
    """A sentence on files that are in the folder and no part of the student."""
    there = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    others = [name for name in there if name not in files]
    named = ", ".join(others[:5]) + (f" and {len(others) - 5} others" if len(others) > 5 else "")
    return [f"not uploaded, as no part of a student: {named}"] if others else []


def _of_best(folder: Path) -> list[str]:
    best = folder.absolute().parent / "best"
    if folder.absolute().name != "student" or find_student(best) is None:
        return []
    return [f"this is the last student of its run; push {best} for the one with the best score"]
