"""The files of a student's folder that are published, with what is private taken out of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fdistill.base.errors import CheckpointError
from fdistill.base.files import KEPT_SUFFIXES, read_json_object
from fdistill.config.plain_yaml import parse_yaml
from fdistill.formats.lora_file import LORA_FILE
from fdistill.formats.pipeline_folder import pipeline_files
from fdistill.sharing.private import private_texts, replaced
from fdistill.student_kinds import NOTED_FILES, STUDENT_FILE
from fdistill.students.experts import experts_in
from fdistill.students.folder import OWN_NETWORK

#: A file to publish: one on the disk as it is, or another content for it.
Content = Path | bytes
CONFIG, SAMPLES, CARD = "training_config.yaml", "samples.png", "README.md"
#: Where diffusers and transformers note the folder that something was loaded from; nothing reads it again.
_ORIGINS = ("_name_or_path", "name_or_path")


def student_files(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Names of the files that a student consists of, other than its own JSON file, its card, config and picture.

    Args:
        facts: what the student's JSON file says; that of earlier versions lists no files.
    """
    noted = facts.get(NOTED_FILES)
    if isinstance(noted, dict) and noted:
        outside = [name for name in noted if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside or any(Path(name).suffix not in KEPT_SUFFIXES for name in noted):
            raise CheckpointError(f"{folder / STUDENT_FILE}: lists files that no student has; copy the folder again")
        return sorted(noted)
    single = [path for path in (folder / LORA_FILE, folder / OWN_NETWORK, *experts_in(folder)) if path.is_file()]
    piped = pipeline_files(folder) if (folder / "model_index.json").is_file() else []
    return sorted(path.relative_to(folder).as_posix() for path in (*piped, *single))


def public_files(folder: Path, facts: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Content]:
    """{name: content} of all files but the card and the training config.

    Args:
        facts: what the student's JSON file says, after a check of its files.
        texts: from `private_texts`, of the facts.
    """
    found: dict[str, Content] = {name: folder / name for name in student_files(folder, facts)}
    noted = dict(facts.get(NOTED_FILES, {}))
    for name in filter(_is_config, list(found)):
        cleaned = _public_config(folder / name)
        if cleaned is not None:
            found[name] = cleaned
            if name in noted:
                noted[name] = {"bytes": len(cleaned), "sha256": hashlib.sha256(cleaned).hexdigest()}
    own = replaced({key: value for key, value in facts.items() if key != NOTED_FILES}, texts)
    found[STUDENT_FILE] = _json(own | ({NOTED_FILES: noted} if noted else {}))
    if (folder / SAMPLES).is_file():
        found[SAMPLES] = folder / SAMPLES
    return found


def training_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The text of a student's training config and its values; ("", {}) if it was trained elsewhere.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is no page of settings.
    """
    path = folder / CONFIG
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the student's folder again") from error
    value = parse_yaml(text, str(path))
    return text, value if isinstance(value, dict) else {}


def config_text(values: Mapping[str, Any]) -> str:
    """Settings as YAML, in the form in which runs write them."""
    stream = io.StringIO()
    YAML().dump(dict(values), stream)
    return stream.getvalue()


def _is_config(name: str) -> bool:
    last = Path(name).name
    return last in ("config.json", "model_index.json") or last.endswith("_config.json")


def _public_config(path: Path) -> bytes | None:
    """The config of a component without paths; None if it has none."""
    try:
        settings = read_json_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the student's folder again") from error
    kept = {key: value for key, value in settings.items() if key not in _ORIGINS}
    # Other libraries read these texts, so that one with a slash in it stays unless it can be nothing but a path.
    texts = {old: new for old, new in private_texts(kept, path.parent).items() if old.count("/") > 1 and old[0] == "/"}
    return None if kept == settings and not texts else _json(replaced(kept, texts))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
