"""What :class:`~serve_app.domain.rotation.Rotation` wants done, and how it remembers what it decided. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.domain.routing import Lease


@dataclass(frozen=True, slots=True)
class Grant:
    """The request may run on ``model``; ``lease`` is None when it only warmed it, and until one that waited is
    :class:`~serve_app.domain.rotation_events.Claimed`."""

    ticket: str
    model: str
    holder: str
    lease: Lease | None
    waited_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request ends; ``error`` is a ``RotundaError.to_dict()``."""

    ticket: str
    error: Mapping[str, Any]
    reason: str

    @property
    def code(self) -> str:
        return str(self.error["code"])


@dataclass(frozen=True, slots=True)
class Load:
    """Start the first replica of ``model``. It fits now; ``node`` is where, if the executor can choose."""

    model: str
    node: str
    epoch: int
    reason: str
    evicted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Extend:
    """A holder's lease goes on."""

    holder: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class Revoke:
    """Tell ``holder`` to make no more calls under leases up to ``epoch``, and to acknowledge that."""

    model: str
    holder: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """End all replicas of ``model``; nobody may call it any more. Replicas refuse epochs below ``epoch``; streams that
    still run (``drain``: they are known to) end by themselves."""

    model: str
    epoch: int
    drain: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Allow:
    """The most replicas that ``model`` may have now."""

    model: str
    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class Notify:
    """News for a waiting request. ``position`` counts from 1 over the models that wait; ``loading`` is set from the
    moment that room is being made."""

    ticket: str
    model: str
    position: int
    reason: str
    eta_s: float | None = None
    loading: bool = False
    evicting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Log:
    """For the log, and for the counter ``kind``."""

    level: Literal["info", "warning", "error"]
    kind: str
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


Effect = Grant | Refuse | Load | Extend | Revoke | Retire | Allow | Notify | Log


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the history: what was decided at ``at``, and why. ``duration_s`` is the wait or load that it ends."""

    at: float
    action: str
    model: str
    reason: str
    victims: tuple[str, ...] = ()
    duration_s: float | None = None
    caller: str = ""
    times: int = 1

    def to_json(self) -> dict[str, Any]:
        duration = None if self.duration_s is None else round(1000 * self.duration_s, 1)
        return {
            "at": self.at,
            "action": self.action,
            "model": self.model,
            "victims": list(self.victims),
            "reason": self.reason,
            "durationMs": duration,
            "caller": self.caller,
            "times": self.times,
        }
