"""How a reply is wanted, as JSON values: kept with its session, so that another ingress can go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from serve_app.domain.catalog import Capability
from serve_app.domain.generation import ContextPolicy, JsonFormat, Options, Priority
from serve_app.domain.routing import Ask

OnDisconnect = Literal["cancel", "detach"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a session's reply is generated from, beside the conversation up to the message that it answers.

    ``model``: the one asked for, None for the default. ``system``: the system prompt, empty for none. ``images``:
    whether the message has some. ``trace``: the W3C carrier of the request that began it. ``draw_seed``: seeds the
    sampling where the options do not.
    """

    model: str | None = None
    system: str = ""
    images: bool = False
    options: Options = field(default_factory=Options)
    priority: Priority = Priority.HIGH
    fallbacks: tuple[str, ...] = ()
    context_policy: ContextPolicy = "truncate"
    on_disconnect: OnDisconnect = "detach"
    caller: str = "anonymous"
    trace: Mapping[str, str] = field(default_factory=dict)
    draw_seed: int | None = None

    def ask(self, ticket: str) -> Ask:
        """What the router is asked."""
        needs = {Capability.CHAT} | ({Capability.VISION} if self.images else set())
        return Ask(ticket, self.model, frozenset(needs), self.fallbacks, self.priority, self.caller)

    def to_json(self) -> dict[str, Any]:
        """JSON values; fields that hold their default are left out."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(_DEFAULT, field.name)]
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        if "options" in values:
            values["options"] = _changed(self.options)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Wanted:
        """Read :meth:`to_json` back."""
        known = dict(values)
        if "options" in known:
            known["options"] = _options(known["options"])
        if "priority" in known:
            known["priority"] = Priority(known["priority"])
        if "fallbacks" in known:
            known["fallbacks"] = tuple(known["fallbacks"])
        return cls(**known)


_DEFAULT = Wanted()


def _changed(options: Options) -> dict[str, Any]:
    values = {name: value for name, value in asdict(options).items() if value != getattr(_DEFAULT.options, name)}
    if options.response_format is not None:
        values["response_format"] = {"schema": options.response_format.schema}
    return values


def _options(values: Mapping[str, Any]) -> Options:
    known = dict(values)
    for name in ("stop", "stop_token_ids"):
        if name in known:
            known[name] = tuple(known[name])
    if "logit_bias" in known:
        known["logit_bias"] = {int(token): bias for token, bias in known["logit_bias"].items()}
    if "response_format" in known:
        known["response_format"] = JsonFormat(**known["response_format"])
    return Options(**known)
