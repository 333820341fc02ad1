"""Every setting of a run with its values and its default, as the Markdown page docs/api/settings.md.

python scripts/settings_table.py [--out FILE]

A test compares the page with what this prints.
"""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fdistill.base.files import atomic_file
from fdistill.config.schema import DistillConfig

_HEAD = """# Settings

These are all settings of a run. On the command line they are `key=value`, and in a config file the sections are nested:
`generator.lr=1e-4` is `generator: {lr: 1e-4}`. A value that is out of range, or a name that is not here, is refused
before the run starts. A method and a preset replace some of these defaults; `fdistill distill NAME --dry-run` shows
what a run would use.

`python scripts/settings_table.py --out docs/api/settings.md` makes this page."""
#: A bound that only keeps numbers finite says nothing to a reader.
_UNBOUNDED = 1e6
_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}


def _bounds(metadata: Iterable[Any]) -> str:
    found = {key: getattr(bound, key) for bound in metadata for key in _WORDS if hasattr(bound, key)}
    found = {key: value for key, value in found.items() if abs(value) < _UNBOUNDED}
    if found.keys() == {"ge", "le"}:
        return f" from {found['ge']:g} to {found['le']:g}"
    return " " + " and ".join(f"{_WORDS[key]} {value:g}" for key, value in found.items()) if found else ""


def values_of(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a setting may be, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        given = [part for each in inner[1:] for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return values_of(inner[0], [*given, *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(values_of(each) for each in inner)
    if origin is list:
        return f"list of: {values_of(inner[0])}"
    if origin is dict:
        return "settings by name"
    return _NAMES.get(annotation, "text") + _bounds(metadata)


def _default(value: Any) -> str:
    return "`" + (f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"') or '""') + "`"


def table(model: type[BaseModel], section: str = "") -> str:
    """The rows of a section, without the sections in it."""
    rows = ["| setting | values | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if not isinstance(default, BaseModel):
            about = (field.description or "").replace("|", "\\|")
            rows.append(
                f"| `{section}{name}` | {values_of(field.annotation, field.metadata)} | {_default(default)} | {about} |"
            )
    return "\n".join(rows)


def page() -> str:
    """All of it."""
    parts = [_HEAD, "## The run", table(DistillConfig)]
    for name, field in DistillConfig.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel) and name != "objective":
            about = " ".join((model.__doc__ or "").split()).replace("`", "")
            parts += [f"## {name}", *([about] if about else []), table(model, f"{name}.")]
    parts += ["## objective", "Each [method](../methods/README.md) says on its page which settings it has here."]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write it to this file")
    arguments = parser.parse_args()
    made = page()
    if arguments.out is not None:
        with atomic_file(arguments.out) as temporary:
            temporary.write_text(made, encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
