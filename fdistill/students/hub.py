"""Students on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from fdistill.adapters.hub import hub_errors, id_and_revision, is_hub_id
from fdistill.base.errors import CheckpointError
from fdistill.base.files import KEPT_SUFFIXES, read_json_object
from fdistill.student_kinds import NOTED_FILES, STUDENT_FILE


def student_on_hub(name: str) -> Path | None:
    """The folder in the hub's cache of the student with this id, such as "user/name" or "user/name@revision". What the
    cache lacks is downloaded.

    Nothing but configs, tokenizers and safetensors is downloaded. If the hub cannot be reached, the cache is taken.

    Returns:
        None if the name is no id, or neither hub nor cache have a student of it: it may be a teacher's.

    Raises:
        CheckpointError: the hub gives access on request alone, or a part of the student cannot be downloaded.
    """
    if not is_hub_id(name):
        return None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    hub_id, revision = id_and_revision(name)
    with hub_errors(name):
        try:
            described = Path(hf_hub_download(hub_id, STUDENT_FILE, revision=revision, etag_timeout=5))
        except GatedRepoError:
            raise
        except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
            return None
        noted = _noted(described)
        wanted = [STUDENT_FILE, *(noted or [f"*{suffix}" for suffix in KEPT_SUFFIXES])]
        # Of the same commit: somebody may push while this downloads.
        commit = described.parent.name
        folder = Path(snapshot_download(hub_id, revision=commit, allow_patterns=wanted, etag_timeout=5))
    missing = [file for file in noted if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"student {name!r}: the cache lacks {missing[0]}, and the hub did not give it; connect to the hub and try "
            "again, or download the folder elsewhere and pass its path"
        )
    return folder


def _noted(described: Path) -> list[str]:
    """The files that a student's file lists; of earlier versions' and of damaged ones none."""
    try:
        noted = read_json_object(described).get(NOTED_FILES)
    except (OSError, ValueError):
        return []
    return [name for name in noted if Path(name).suffix in KEPT_SUFFIXES] if isinstance(noted, dict) else []
