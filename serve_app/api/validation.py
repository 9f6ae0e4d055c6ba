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
    "missing": "{name} is missing",
    "extra_forbidden": "{name} is not a field of this request",
    "string_type": "{name} must be text",
    "int_type": "{name} must be a whole number",
    "int_from_float": "{name} must be a whole number",
    "float_type": "{name} must be a number",
    "bool_type": "{name} must be true or false",
    "list_type": "{name} must be a list",
    "dict_type": "{name} must be an object",
    "model_type": "{name} must be an object",
    "model_attributes_type": "{name} must be an object",
    "literal_error": "{name} must be {expected}",
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
    lines: list[str] = []
    for problem in problems:
        line = _one_in_words(problem)
        if line not in lines:
            lines.append(line)
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more + "."


def _one_in_words(problem: Mapping[str, Any]) -> str:
    # Union members and "body"/"query" add steps to the path that mean nothing to the reader.
    steps = [step for step in problem["loc"] if isinstance(step, int) or not step[:1].isupper()]
    name = ""
    for step in steps:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else str(step)
    words = _WORDS.get(str(problem["type"]))
    if words is None:
        return f"{name or 'the value'}: {str(problem['msg']).lower()}"
    return words.format(name=name or "the value", expected=problem.get("ctx", {}).get("expected", ""))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
