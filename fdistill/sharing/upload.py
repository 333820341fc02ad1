"""The way to the Hugging Face hub, and what to do where it is barred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fdistill.adapters.hub import offline
from fdistill.base.errors import OutputError, brief
from fdistill.sharing.files import Content

_MAIN = "main"


def upload(
    repo_id: str, files: Mapping[str, Content], *, public: bool, message: str, revision: str | None = None
) -> str:
    """Uploads files in one commit, into a repository that is made if need be.

    Args:
        public: whether everybody may see the repository. One that is there stays as visible as it is.
        revision: a branch, which is made if need be; the main one by default.

    Returns:
        The address of the commit.

    Raises:
        OutputError: the hub is not asked, cannot be reached or refuses; or the repository is there and is public,
            which was not asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if offline():
        raise OutputError(f"push {repo_id}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it, and push again")
    if get_token() is None:
        raise OutputError(
            f"push {repo_id}: no token says who you are; run `hf auth login` with a token that may write "
            "(huggingface.co/settings/tokens), and push again"
        )
    api: Any = HfApi()
    with _refusals(repo_id):
        api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and not api.model_info(repo_id).private:
            raise OutputError(
                f"push {repo_id}: this repository is there already, and everybody can see it; pass --public if that is "
                "meant, or choose another name"
            )
        if revision not in (None, _MAIN):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        done = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(done.commit_url)


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """Raises OutputError for what the hub, its client or the HTTP library raise."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # the HTTP library, and with it the class of errors, differs between versions
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise OutputError(f"push {repo_id}: {_advice(repo_id, status, error)}") from error


def _advice(repo_id: str, status: int | None, error: Exception) -> str:
    owner = repo_id.split("/")[0]
    if status == 401:
        return "the hub does not accept your token; run `hf auth login` with a new one, and push again"
    if status == 403:
        return (
            f"your token may not write to {owner}; make one with write access (huggingface.co/settings/tokens), run "
            "`hf auth login` with it, or push under your own name"
        )
    if isinstance(error, ValueError) and "metadata" in str(error):
        return f"the hub refuses the metadata of README.md ({brief(error)}); mend the card's head, or the --license"
    if status is not None and status < 500:
        return f"the hub refuses ({brief(error)})"
    return (
        f"the upload broke off ({brief(error)}); push again when the connection is back: large files that arrived are "
        "not sent again, and nothing is visible before all are there"
    )
