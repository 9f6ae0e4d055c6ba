"""What the scripted engine replies: its settings, as :mod:`serve_app.engines.scripted` lists them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from serve_app.domain.errors import InvalidConfig, InvalidInput, RotundaError, error_from_dict
from serve_app.domain.generation import Message

DEFAULT_TOKENS = 16
DIRECTIVE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
EXTRA_ONLY = ("text", "load_s", "load_error", "directives")


@dataclass(frozen=True, slots=True)
class Script:
    """The settings of one reply; see the module's table."""

    tokens: int | None = None
    ttft: float = 0.0
    pace: float = 0.0
    in_step: bool = False
    echo: bool = False
    fail_at: int | None = None
    error: str | None = None
    hang_at: int | None = None
    hold_mb: int | None = None
    continues: str = "text"
    text: str | None = None
    load_s: float = 0.0
    load_error: str | None = None
    directives: bool = True

    def failure(self) -> RotundaError:
        code = self.error or "GENERATION_FAILED"
        return error_from_dict({"code": code, "message": "The script asked for this failure."})


def read_setting(name: str, value: object) -> Any:
    """A setting's value, of the right type.

    Raises:
        ValueError: no such setting, or not a value for it.
    """
    if name in ("tokens", "fail_at", "hang_at", "hold_mb"):
        return _at_least_zero(int(str(value)))
    if name in ("ttft", "pace", "load_s"):
        return _at_least_zero(float(str(value)))
    if name in ("echo", "directives", "in_step") and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if name in ("error", "load_error") and error_from_dict({"code": value}).code == value:
        return value
    if name == "text" or (name == "continues" and value in ("text", "restart", "refuse")):
        return str(value)
    raise ValueError(name)


def _at_least_zero(number: Any) -> Any:
    if not 0 <= number < float("inf"):
        raise ValueError(number)
    return number


def read_extra(extra: tuple[tuple[str, object], ...]) -> Script:
    """The engine's settings.

    Raises:
        InvalidConfig: an unknown one, or a value that cannot be read.
    """
    known = {field.name for field in fields(Script)}
    values: dict[str, Any] = {}
    for name, value in extra:
        if name not in known:
            raise InvalidConfig(f"The scripted engine has no setting {name!r}; it has {', '.join(sorted(known))}.")
        try:
            values[name] = read_setting(name, value)
        except (ValueError, OverflowError) as fault:
            raise InvalidConfig(f"{value!r} is no value for the scripted engine's {name}.") from fault
    return Script(**values)


def read_directives(script: Script, message: Message) -> Script:
    """``script`` as the directives in the message change it.

    Raises:
        InvalidInput: a directive that cannot be read.
    """
    values: dict[str, Any] = {}
    for inner in DIRECTIVE.findall(message.text) if script.directives else ():
        for word in inner.split():
            name, equals, value = word.partition("=")
            try:
                if not equals or name in EXTRA_ONLY:
                    raise ValueError(word)
                values[name] = read_setting(name, value)
            except (ValueError, OverflowError) as fault:
                raise InvalidInput(f"The directive {word!r} cannot be read.") from fault
    return replace(script, **values)


def reply_pieces(script: Script, message: Message) -> Callable[[int], str]:
    """The text of token ``n``."""
    words = re.findall(r"\s*\S+(?:\s+\Z)?", _source(script, message))
    if not words:
        return lambda n: f" word{n}" if n else "word0"
    seam = "" if words[-1][-1].isspace() or words[0][0].isspace() else " "
    return lambda n: (seam if n and n % len(words) == 0 else "") + words[n % len(words)]


def reply_length(script: Script, message: Message) -> int:
    if script.tokens is not None:
        return script.tokens
    return len(_source(script, message).split()) or DEFAULT_TOKENS


def _source(script: Script, message: Message) -> str:
    return (DIRECTIVE.sub("", message.text).strip() if script.echo else script.text) or ""
