"""Models on the Hugging Face hub: which names are ids of them, and what the client's errors mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fdistill.base.errors import CheckpointError


def is_hub_id(name: str) -> bool:
    """Whether a name may be an id such as "user/name", or "user/name@revision": nothing on the disk has it, and no path
    begins like it.
    """
    path = Path(name)
    of_path = path.exists() or path.is_absolute() or name.startswith((".", "~"))
    return not of_path and id_and_revision(name)[0].count("/") == 1


def id_and_revision(name: str) -> tuple[str, str | None]:
    """The two parts of "user/name@revision"; a revision is a branch, a tag or a commit, None for the main branch."""
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or None


def offline() -> bool:
    """Whether the client was told to ask nothing of the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def hub_errors(hub_id: str) -> Iterator[None]:
    """Raises CheckpointError for what the hub's errors mean."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"checkpoint {hub_id!r}: its owner gives access on request; accept the conditions on "
            f"huggingface.co/{id_and_revision(hub_id)[0]}, run `hf auth login`, and try again"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = "HF_HUB_OFFLINE=1 and the cache has none" if offline() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {hub_id!r}: no such folder, and the hub gave no model of that id ({why}); check the id, run "
            "`hf auth login` if the model is private, or download the folder elsewhere and pass its path"
        ) from error
