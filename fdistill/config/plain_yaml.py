"""YAML of plain values: mappings, lists, texts, numbers, true, false and null, within limits. Imports no torch.

A config is a page of settings. Whatever makes a reader of YAML slow, large or surprising is refused before any value is
built: tags, aliases inside aliases, depth, size.
"""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from fdistill.base.errors import ConfigError

#: Far above what configs have. With so few aliases, none of them inside another, nothing grows beyond their product.
MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH, MAX_ALIASES = 100_000, 10_000, 20, 100


class _Plain(SafeConstructor):
    """Builds a date as the text that it is written as: no setting is a date, but a folder's name may look like one."""


_Plain.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, by the 1.2 rules: `1e-5` is a number and `no` is a word.

    Args:
        where: what the text is, for messages.

    Raises:
        ConfigError: it is not YAML, has tags, or is larger or deeper than any config.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: has more than {MAX_CHARACTERS:,} characters; expected a page of settings")
    try:
        _check_events(text, where)
        reader = YAML(typ="safe", pure=True)
        reader.Constructor = _Plain
        return reader.load(text)
    except ConfigError:
        raise
    except (YAMLError, ValueError, TypeError) as error:  # a number of thousands of digits, a list as a key
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from error


def _check_events(text: str, where: str) -> None:
    """Refuses what is no plain page of settings, while the text is read event by event and nothing is built."""
    depth = values = aliases = 0
    anchored: int | None = None  # the depth of the value with a name that is being read
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            depth -= 1
            anchored = None if anchored == depth else anchored
            continue
        opens = isinstance(event, (MappingStartEvent, SequenceStartEvent))
        if not opens and not isinstance(event, (ScalarEvent, AliasEvent)):
            continue
        values += 1
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, AliasEvent):
            aliases += 1
            if anchored is not None:
                raise ConfigError(f"{where}: {line}: an alias inside an anchored value; expected the value itself")
        elif event.tag is not None:
            raise ConfigError(f"{where}: {line}: has the tag {str(event.tag)!r}; expected plain values without tags")
        elif opens and event.anchor is not None and anchored is None:
            anchored = depth
        depth += opens
        if depth > MAX_DEPTH or values > MAX_VALUES or aliases > MAX_ALIASES:
            raise ConfigError(
                f"{where}: {line}: more than {MAX_DEPTH} levels, {MAX_VALUES:,} values or {MAX_ALIASES} aliases; "
                "expected a page of settings"
            )
