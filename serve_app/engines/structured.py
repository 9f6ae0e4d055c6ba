"""Replies of a given form: JSON, JSON of a schema, tool calls. Enforced token by token by llguidance.

A schema is compiled once, where prompts are made (never in the event loop nor in the thread that computes), and kept.
The library works with budgets: what is too large, contradictory or not supported is refused before the request starts,
and a step that exceeds its budget ends that request alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from serve_app.domain.errors import GenerationFailed, InvalidInput
from serve_app.domain.generation import GenerationRequest
from serve_app.domain.tools import ToolUse
from serve_app.engines.vocabulary import Vocabulary

MAX_SCHEMA_CHARACTERS = 65_536
MAX_SCHEMA_DEPTH = 64
"""Of the schema's own JSON."""
MAX_CALLS = 16
"""Calls in one reply that was forced to call."""
KEPT = 128
"""Compiled schemas, and refusals, per model."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,  # 10 ms
    "step_lexer_fuel": 100_000,  # 7 ms
    "step_max_items": 20_000,  # 1 ms
    "max_lexer_states": 10_000,  # 20 MB
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
"""Budgets of llguidance, with the time or memory that they stand for by its documentation."""
BLANKS = r"[ ]?"
"""Between two parts of JSON. Left to itself a weak model writes blanks until its tokens are spent."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Grammar:
    """One reply's place in its grammar; implements :class:`serve_app.engines.sampling.Constraint`.

    ``never`` is a token that must not be drawn, whatever the library says.
    """

    def __init__(self, matcher: Any, never: int | None = None) -> None:
        self._matcher = matcher
        self._never = never

    @property
    def complete(self) -> bool:
        """Whether the form leaves nothing to add."""
        return bool(self._matcher.is_stopped())

    def allowed(self, size: int) -> torch.Tensor:
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        found = torch.zeros(size, dtype=torch.bool)
        known = min(size, bits.numel())
        found[:known] = bits.flatten()[:known].bool()
        if self._never is not None:
            found[self._never] = False
        return found

    def allows(self, token: int) -> bool:
        valid = self._matcher.validate_tokens([token]) == 1
        self._check()
        return bool(valid) and token != self._never

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationFailed("The form that was asked for became too complex. Use a simpler schema.")


class Grammars:
    """The grammars of one model. Slow: never in an event loop. Safe for threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Grammars({len(self._kept)} kept)"

    def of(self, request: GenerationRequest) -> Grammar | None:
        """What the reply to ``request`` must look like; None for free text.

        Raises:
            InvalidInput: a schema that is too large, or that no reply can fit, or that is not supported; a text to
                continue that does not fit.
            CapabilityMissing: the model's tokenizer does not allow it.
        """
        schema = schema_of(request)
        if schema is None:
            return None
        matcher = self._compiled(schema).deep_copy()
        if request.continue_final:
            begun = self._vocabulary.library.tokenize_str(request.messages[-1].text)
            if not matcher.consume_tokens(begun):
                raise InvalidInput("The text to continue is not of the form that is asked for.")
        return Grammar(matcher, self._vocabulary.stand_in)

    def spell(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return self._vocabulary.spell(token)

    def _compiled(self, schema: Mapping[str, Any] | bool) -> Any:
        text = _checked_text(schema)
        key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        if found is None:
            try:
                found = self._compile(text)
            except InvalidInput as refusal:
                found = refusal
            self._keep(key, found)
        if isinstance(found, InvalidInput):
            raise InvalidInput(found.message, details=found.details)
        return found

    def _keep(self, key: str, found: Any) -> None:
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        try:
            # What a schema says in "x-guidance" must not relax the rules: overrides count last.
            overrides: Any = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": BLANKS}
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
            matcher = LLMatcher(self._vocabulary.library, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        except ValueError as fault:
            raise refused(str(fault)) from fault
        if matcher.is_error():
            raise refused(matcher.get_error())
        trial = matcher.deep_copy()
        trial.compute_bitmask()  # also builds the first states, which all copies share
        if trial.is_error() or trial.is_stopped():
            raise refused(trial.get_error())
        return matcher


def schema_of(request: GenerationRequest) -> Mapping[str, Any] | bool | None:
    """The JSON Schema that the reply must fit; None for free text."""
    if request.tools.forced:
        return calls_schema(request.tools)
    wanted = request.options.response_format
    if wanted is None:
        return None
    return ANY_OBJECT if wanted.schema is None else wanted.schema


def calls_schema(use: ToolUse) -> dict[str, Any]:
    """A list of calls: ``[{"name": …, "arguments": {…}}, …]``.

    Each tool's parameters become a definition of its own, and their references are bent to lead there.
    """
    definitions: dict[str, Any] = {}
    shapes: list[dict[str, Any]] = []
    for number, tool in enumerate(use.callable):
        place = f"tool{number}"
        definitions[place] = {"type": "object", **_moved(dict(tool.parameters), f"#/$defs/{place}")}
        arguments = {"$ref": f"#/$defs/{place}"}
        shapes.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {
        "type": "array",
        "items": shapes[0] if len(shapes) == 1 else {"anyOf": shapes},
        "minItems": 1,
        "maxItems": MAX_CALLS if use.parallel else 1,
        "$defs": definitions,
    }


def _moved(value: Any, place: str) -> Any:
    """A schema that lies at ``place`` of another one."""
    _check_size(value)
    return _bent(value, place)


def _bent(value: Any, place: str) -> Any:
    if isinstance(value, Mapping):
        return {
            key: place + below[1:]
            if key == "$ref" and isinstance(below, str) and below.startswith("#")
            else _bent(below, place)
            for key, below in value.items()
            if key not in ("$schema", "$id")
        }
    return [_bent(below, place) for below in value] if isinstance(value, list | tuple) else value


def _check_size(schema: Any) -> None:
    """Measure before anything walks through it that would not come back soon."""
    level, depth, count = [schema], 0, 0
    while level:
        count += len(level)
        if depth > MAX_SCHEMA_DEPTH or count > MAX_SCHEMA_CHARACTERS // 2:
            raise _too_large()
        depth += 1
        level = [below for item in level if isinstance(item, Mapping | list | tuple) for below in _below(item)]


def _below(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value


def _checked_text(schema: Mapping[str, Any] | bool) -> str:
    if not isinstance(schema, Mapping | bool):
        raise InvalidInput("A JSON schema is an object.", details={"param": "response_format"})
    if schema is False:
        raise refused("unsatisfiable")
    schema = {} if schema is True else schema
    _check_size(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as fault:
        raise InvalidInput("The schema is no JSON.", details={"param": "response_format"}) from fault
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise _too_large()
    return text


def _too_large() -> InvalidInput:
    return InvalidInput(
        f"The schema is too large: at most {MAX_SCHEMA_CHARACTERS} characters, nested {MAX_SCHEMA_DEPTH} deep.",
        details={"param": "response_format"},
    )


def refused(why: str) -> InvalidInput:
    """The refusal of a schema, in our words: the library's may tell of its inside."""
    keys = re.findall(r'"([$A-Za-z]{1,40})"', why) if why.startswith("Unimplemented keys") else []
    if keys:
        message = f"The schema uses keywords that are not supported here: {', '.join(keys[:8])}."
    elif "nsatisfiable" in why or "NoExtension" in why:
        message = "Nothing can fit the schema: it contradicts itself."
    else:
        message = "The schema cannot be used: it is malformed, refers to what it does not hold, or is too complex."
    return InvalidInput(message, details={"param": "response_format"})
