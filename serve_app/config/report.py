"""From pydantic's errors to one report that says which value is wrong, why, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serve_app.config.redaction import shown
from serve_app.domain.errors import InvalidConfig


def invalid(problems: Sequence[str]) -> InvalidConfig:
    """All problems as one error; ``details["problems"]`` lists them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return InvalidConfig(f"The configuration has {count}:\n{lines}", details={"problems": list(problems)})


def reason(error: ErrorDetails) -> str:
    """Why a value was refused, without the library's wording and without the value."""
    text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    text = text.partition(", unable to parse")[0].partition(", got ")[0]
    text = text.replace("Input should be", "it must be").replace("an integer", "a whole number")
    text = text.replace("a valid integer", "a whole number").replace("a valid boolean", "true or false")
    return text.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Words that help with an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known are: {', '.join(names)}."


def problems_of(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """One sentence for each error of ``model`` found in ``where`` (a file, or an application's arguments)."""
    return [f"{where}: {_sentence(found, model)}" for found in error.errors(include_url=False)]


def _sentence(error: ErrorDetails, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        return f"{place} is unknown; {suggestion(str(error['loc'][-1]), known)}" if known else f"{place} is unknown."
    if error["type"] == "missing":
        return f"{place} is missing."
    if not place:
        return f"{reason(error)}."
    return f"{place} = {shown(str(error['loc'][-1]), error['input'])}: {reason(error)}."


def _fields_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The fields of the model that stands at ``path`` below ``model``; empty when it is not one."""
    for part in path:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(str(part))
        nested = (
            [kind for kind in _parts(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
            if info
            else []
        )
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _parts(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(part for argument in inner for part in _parts(argument))]
