"""Calls of tools, read out of what a model writes. Each family of models has its own way.

========  ==========================================================================  =================================
family    a call                                                                      known by, in the chat template
========  ==========================================================================  =================================
hermes    ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, several            ``<tool_call>``
mistral   ``[TOOL_CALLS][{"name": …, "arguments": {…}}, …]``, or                       ``[TOOL_CALLS]``
          ``[TOOL_CALLS]name[ARGS]{…}``, several
json      the whole reply is ``{"name": …, "parameters": {…}}``, several with ``;``;   everything else (Llama 3)
          ``<|python_tag|>`` may go before
forced    ``[{"name": …, "arguments": {…}}, …]``, by a grammar                         a request that forces a call
========  ==========================================================================  =================================

A call is told as soon as it is whole. What begins like a call and is none comes back as text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.domain.tools import ToolCallPart
from serve_app.engines.text import StopFilter

HERMES, MISTRAL, JSON = "hermes", "mistral", "json"
MARKS = {HERMES: ("<tool_call>", "</tool_call>"), MISTRAL: ("[TOOL_CALLS]", "[ARGS]"), JSON: ("<|python_tag|>",)}
"""Texts that the detokenizer must not leave out, should they be control tokens."""
CALL_KEYS = ("name", "arguments", "parameters", "type", "function")
_NAMED = re.compile(r"\s*([\w.-]{1,64})\s*(?:\[CALL_ID\]\w*\s*)?(?:\[ARGS\])?\s*(?=\{)")
_FIRST_KEY = re.compile(r'\{\s*"([^"]*)"')
_ALPHABET = string.ascii_letters + string.digits


def takes_tools(template: str) -> bool:
    """Whether a chat template tells the model of tools."""
    return re.search(r"\{[%{][^%}]*\btools\b", template) is not None


def family_of(template: str) -> str:
    """See the module's table."""
    return next((family for family in (HERMES, MISTRAL) if MARKS[family][0] in template), JSON)


@dataclass(slots=True)
class Found:
    """What a piece of the reply turned out to be."""

    text: str = ""
    calls: list[ToolCallPart] = field(default_factory=list)


class Reader(Protocol):
    """Reads the calls out of a reply that comes in pieces of any size."""

    def feed(self, text: str) -> Found: ...

    def finish(self) -> Found:
        """What was held back, when nothing follows."""
        ...


class _Calls:
    """Numbers the calls of a reply and gives them their ids."""

    def __init__(self, make_id: Callable[[], str]) -> None:
        self._make_id = make_id
        self._count = 0

    def of(self, value: Any) -> ToolCallPart | None:
        """A call from its JSON, or None."""
        value = value.get("function", value) if isinstance(value, dict) else None
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or not name:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, dict):
            return None
        return self.named(name, arguments)

    def named(self, name: str, arguments: dict[str, Any]) -> ToolCallPart:
        part = ToolCallPart(self._count, json.dumps(arguments, ensure_ascii=False), self._make_id(), name)
        self._count += 1
        return part

    def all_of(self, values: Sequence[Any]) -> list[ToolCallPart] | None:
        """The calls from their JSON; None unless each is one."""
        before = self._count
        calls = [call for value in values if (call := self.of(value)) is not None]
        if len(calls) < len(values) or not calls:
            self._count = before
            return None
        return calls


class HermesReader:
    """Calls between marks, with text before, between and after."""

    def __init__(self) -> None:
        self._begin, self._end = MARKS[HERMES]
        self._calls = _Calls(_long_id)
        self._body: str | None = None
        self._text = ""
        self._filter = StopFilter([self._begin])

    def feed(self, text: str) -> Found:
        found = Found()
        while text:
            text = self._outside(text, found) if self._body is None else self._inside(text, found)
        return found

    def finish(self) -> Found:
        if self._body is None:
            rest, self._text = self._text, ""
            return Found(rest)
        call = self._calls.of(_json(self._body))
        return Found(calls=[call]) if call is not None else Found(self._begin + self._body)

    def _outside(self, text: str, found: Found) -> str:
        place = self._filter.push(text)
        self._text += text if place is None else text[:place]
        if place is None:
            given = len(self._text) - self._filter.held
            found.text += self._text[:given]
            self._text = self._text[given:]
            return ""
        found.text += self._text[: -len(self._begin)]
        self._text, self._body = "", ""
        return text[place:]

    def _inside(self, text: str, found: Found) -> str:
        assert self._body is not None
        searched = max(0, len(self._body) - len(self._end) + 1)
        self._body += text
        place = self._body.find(self._end, searched)
        while place >= 0 and _within_string(self._body[:place]):
            place = self._body.find(self._end, place + 1)
        if place < 0:
            return ""
        body, rest = self._body[:place], self._body[place + len(self._end) :]
        call = self._calls.of(_json(body))
        if call is not None:
            found.calls.append(call)
        else:
            found.text += self._begin + body + self._end
        self._body = None
        self._filter = StopFilter([self._begin])
        return rest


class WholeReader:
    """Calls that are known only when the reply is whole: text flows until something begins like a call."""

    def __init__(
        self, begins: Callable[[str], bool | None], parse: Callable[[str, _Calls], Any], calls: _Calls
    ) -> None:
        self._begins = begins
        self._parse = parse
        self._calls = calls
        self._text = ""
        self._free = False

    def feed(self, text: str) -> Found:
        if self._free:
            return Found(text)
        self._text += text
        if self._begins(self._text) is False:
            self._free = True
            given, self._text = self._text, ""
            return Found(given)
        return Found()

    def finish(self) -> Found:
        rest, self._text = self._text, ""
        calls = self._parse(rest, self._calls) if rest.strip() else None
        return Found(calls=calls) if calls else Found(rest)


class MistralReader:
    """Text, then a mark, then calls to the end."""

    def __init__(self) -> None:
        self._mark = MARKS[MISTRAL][0]
        self._filter = StopFilter([self._mark])
        self._calls = _Calls(_short_id)
        self._held = ""
        self._body: str | None = None

    def feed(self, text: str) -> Found:
        if self._body is not None:
            self._body += text
            return Found()
        place = self._filter.push(text)
        self._held += text
        if place is not None:
            end = len(self._held) - len(text) + place
            given, self._body = self._held[: end - len(self._mark)], self._held[end:]
            return Found(given)
        length = len(self._held) - self._filter.held
        given, self._held = self._held[:length], self._held[length:]
        return Found(given)

    def finish(self) -> Found:
        if self._body is None:
            return Found(self._held)
        calls = _mistral_calls(self._body, self._mark, self._calls)
        return Found(calls=calls) if calls else Found(self._mark + self._body)


def _mistral_calls(body: str, mark: str, calls: _Calls) -> list[ToolCallPart] | None:
    value = _json(body)
    if isinstance(value, list):
        return calls.all_of(value)
    values = []
    for piece in body.split(mark):
        named = _NAMED.match(piece)
        arguments = _json(piece[named.end() :]) if named else None
        if named is None or not isinstance(arguments, dict):
            return None
        values.append({"name": named[1], "arguments": arguments})
    return calls.all_of(values)


class ForcedReader:
    """The list that a grammar forces the model to write; each call is told when it is whole."""

    def __init__(self) -> None:
        self._calls = _Calls(_long_id)
        self._decoder = json.JSONDecoder()
        self._text = ""

    def feed(self, text: str) -> Found:
        self._text += text
        found = Found()
        while "}" in text:
            body = self._text.lstrip(" \n\r\t[,]")
            try:
                value, end = self._decoder.raw_decode(body)
            except ValueError:
                break
            call = self._calls.of(value)
            if call is None:
                break
            found.calls.append(call)
            self._text = body[end:]
        return found

    def finish(self) -> Found:
        rest, self._text = self._text, ""
        return Found("" if rest.strip(" \n\r\t[,]") == "" else rest)


def reader_for(family: str, names: Sequence[str], forced: bool) -> Reader:
    """A reader for one reply.

    Args:
        names: of the tools that were offered; JSON without marks is a call only when it names one.
    """
    if forced:
        return ForcedReader()
    if family == HERMES:
        return HermesReader()
    if family == MISTRAL:
        return MistralReader()
    return WholeReader(
        _begins_like_json, lambda text, calls: _json_calls(text, calls, frozenset(names)), _Calls(_long_id)
    )


def _begins_like_json(text: str) -> bool:
    """Whether a text that begins so may still be a call."""
    text = text.lstrip()
    mark = MARKS[JSON][0]
    if mark.startswith(text):
        return True
    text = text.removeprefix(mark).lstrip()
    if text and text[0] != "{":
        return False
    key = _FIRST_KEY.match(text)
    return key is None or key[1] in CALL_KEYS


def _json_calls(text: str, calls: _Calls, names: frozenset[str]) -> list[ToolCallPart] | None:
    rest = text.strip().removeprefix(MARKS[JSON][0]).strip()
    decoder, values = json.JSONDecoder(), []
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        rest = rest[end:].lstrip(" \n;")
    if not all(isinstance(value, dict) and value.get("name") in names for value in values):
        return None
    return calls.all_of(values)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _within_string(text: str) -> bool:
    """Whether JSON that goes on after ``text`` does so within a string."""
    inside = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\" and inside:
            escaped = True
        elif character == '"':
            inside = not inside
    return inside


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Mistral's templates insist on nine letters and digits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))
