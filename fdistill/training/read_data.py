"""What a run has read: one line on the terminal, and data.json in its folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdistill.base.files import atomic_file, read_json_object
from fdistill.data.account import account_of, say
from fdistill.data.sample_loader import SampleSource, ScaledLatents
from fdistill.training.distillation import Distillation
from fdistill.training.inputs import Data

RECORD = "data.json"


def facts_of(run: Distillation, source: Data) -> dict[str, Any]:
    """What a run reads, for data.json; "summary" is the line that stands for it."""
    prompts = {} if run.text is None else {"prompts": len(run.text.index)}
    if isinstance(source, ScaledLatents):
        meta = source.source.meta
        read = meta.get("read", {})
        summary = f"{len(source.labels):,} latents of {meta.get('source')}"
        if read:
            summary += f": {read['summary']}"
        unreadable = meta.get("unreadable")
        if unreadable:
            summary += f"; {len(unreadable):,} could not be decoded"
        return {"summary": summary, "read": read, "unreadable": unreadable or [], **prompts}
    if not isinstance(source, SampleSource):
        return {**account_of(source, captioned=run.text is not None).facts(), **prompts}
    if run.text is None:
        return {"summary": "no images; classes in turn"}
    named = "" if run.config.prompts is None else f" of {run.config.prompts}"
    return {"summary": f"no images; {len(run.text.index):,} prompts{named}", **prompts}


def note(folder: Path, run: Distillation, source: Data, scored: Mapping[str, Any]) -> None:
    """Prints what a run reads, and writes it to data.json, with what is read for its scores. It warns
    if a resumed run reads other data than before.
    """
    facts, path = {**facts_of(run, source), **scored}, folder / RECORD
    say("data", facts["summary"])
    try:
        before = read_json_object(path)["summary"] if path.is_file() else facts["summary"]
    except (OSError, ValueError, KeyError):
        before = f"data that are not known any more, as {RECORD} is damaged"
    if before != facts["summary"]:
        warnings.warn(
            f"{path}: the run began with {before}, and its data are now {facts['summary']}. It goes on with the new "
            "ones; to keep to the old, stop it and put them back as they were",
            stacklevel=2,
        )
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
