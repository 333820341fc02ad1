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
    return f"{key}: got {shown(problem['input'])}; {_expected(problem, message)}"


#: What a value should have been, by pydantic's name of the problem.
_EXPECTED = {
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected a text",
    "list_type": "expected a list, as in [0.9, 0.99]",
    "dict_type": "expected settings by name",
    "model_type": "expected settings by name",
    "model_attributes_type": "expected settings by name",
}
_BOUNDS = {"less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}
_BOUNDS |= {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt")}


def _expected(problem: Any, message: str) -> str:
    kind = problem["type"]
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"expected {words} {problem['ctx'][bound]}"
    return _EXPECTED.get(kind, f"{message[0].lower()}{message[1:]}")
