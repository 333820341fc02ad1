"""Sentences for what pydantic found wrong. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from fdistill.base.errors import did_you_mean, shown


def explain(problem: Any, root: type[BaseModel]) -> str:
    """One of `ValidationError.errors()` as a sentence that starts with the dotted key, for a model of class `root`."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section = root
        for part in location[:-1]:
            annotation = section.model_fields[part].annotation
            assert isinstance(annotation, type)
            assert issubclass(annotation, BaseModel)
            section = annotation
        return f"{key}: no such setting; {did_you_mean(location[-1], section.model_fields)}"
    if problem["type"] == "literal_error":
        context = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: got {shown(problem['input'])}; {did_you_mean(str(problem['input']), context)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: got {shown(problem['input'])}; {message[0].lower()}{message[1:]}"
