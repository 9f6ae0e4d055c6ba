"""Tools that a model may call, and the calls it makes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.domain.errors import InvalidInput

MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 512_000
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON Schema of its arguments.

    The name has 1 to 64 letters, digits, dots, dashes and underscores; else :class:`InvalidInput`.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.match(self.name):
            raise _wrong("The name of a tool has 1 to 64 letters, digits, dots, dashes and underscores.")

    def to_json(self) -> dict[str, Any]:
        """As OpenAI and chat templates write it."""
        parameters = dict(self.parameters) or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request and how it wants them used.

    ``choice``: "none" hides them from the model, "auto" lets it choose, "required" makes it call at least one;
    ``name`` makes it call that one. ``parallel``: whether it may make several calls in one reply. At most 128 tools,
    of 512,000 characters together; else :class:`InvalidInput`.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "auto"
    name: str | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        if len(self.tools) > MAX_TOOLS:
            raise _wrong(f"tools holds {len(self.tools)} tools; at most {MAX_TOOLS} are allowed.")
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise _wrong("Two tools have the same name.")
        if sum(len(json.dumps(tool.to_json())) for tool in self.tools) > MAX_TOOLS_CHARACTERS:
            raise _wrong(f"The tools have more than {MAX_TOOLS_CHARACTERS} characters together.")
        if self.name is not None and self.name not in names:
            raise _wrong(f"tool_choice names {self.name[:64]!r}, which is none of the tools.", "tool_choice")
        if self.choice == "required" and not self.tools:
            raise _wrong("tool_choice is required, but there are no tools.", "tool_choice")

    @property
    def offered(self) -> bool:
        """Whether the model is told of tools."""
        return bool(self.tools) and self.choice != "none"

    @property
    def forced(self) -> bool:
        """Whether the reply must be a call."""
        return self.offered and (self.choice == "required" or self.name is not None)

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that a forced call may be of."""
        return tuple(tool for tool in self.tools if self.name in (None, tool.name))


NO_TOOLS = ToolUse()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant made; ``arguments`` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A piece of the call number ``index`` of a reply. The first piece of a call has its id and name; the arguments
    of all its pieces together are the text of a JSON object."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


def _wrong(message: str, param: str = "tools") -> InvalidInput:
    return InvalidInput(message, details={"param": param})
