"""Values from outside, checked against a model; what is wrong is said in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from serve_app.domain.errors import InvalidInput, MalformedRequest

_SHOWN = 5
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a field of this request",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
}


class StrictModel(BaseModel):
    """A request's body: camelCase names, no unknown fields, no conversion of types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, alias_generator=to_camel)


Model = TypeVar("Model", bound=BaseModel)


def parse_json(data: bytes | str, what: str = "The request's body") -> Any:
    """The JSON value.

    Raises:
        MalformedRequest: it is none. So are NaN, endless nesting, and halves of characters: nothing could store them.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise MalformedRequest(f"{what} is nested too deeply.") from error
    except ValueError as error:
        raise MalformedRequest(f"{what} is not valid JSON.") from error


def read(model: type[Model], value: Any) -> Model:
    """``value`` as ``model``; InvalidInput names every field that is wrong."""
    if not isinstance(value, Mapping):
        raise InvalidInput("The request's body must be a JSON object.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidInput(in_words(error.errors(include_input=False, include_url=False))) from error


def in_words(problems: Sequence[Mapping[str, Any]]) -> str:
    """Pydantic's list of errors as one line. The values themselves are not repeated."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        known = found.setdefault(_name(problem), [])
        words = _words(problem)
        if words not in known:
            known.append(words)
    lines = [f"{name} {' or '.join(words)}" for name, words in found.items()]
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more + "."


def _name(problem: Mapping[str, Any]) -> str:
    """Where it is wrong, by the names that the sender used."""
    name = ""
    for step in problem["loc"]:
        if isinstance(step, int):
            name += f"[{step}]"
        elif not name:
            name = str(step)
        elif step != "str" and "[" not in step:  # which member of a union was tried means nothing to the reader
            name += f".{step}"
    return name or "the value"


def _words(problem: Mapping[str, Any]) -> str:
    words = _WORDS.get(str(problem["type"]))
    if words is None:
        return f"is refused: {str(problem['msg']).lower()}"
    return words.format(expected=problem.get("ctx", {}).get("expected", ""))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
