"""The models, settings and events of :class:`~serve_app.domain.rotation.Rotation`. Plain values.

Models are named by their full name (``provider/id``). Times are seconds on the clock that the caller passes in with
every event; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.domain.catalog import LOCAL_PROVIDER, ModelState
from serve_app.domain.errors import InvalidConfig
from serve_app.domain.generation import Priority
from serve_app.domain.placement import NOTHING, Node, Resources


@dataclass(frozen=True, slots=True)
class Model:
    """A model that rotation knows.

    Args:
        name: full name.
        demand: what one replica declares.
        pool: the provider instance in whose nodes it lives.
        reload_s: estimate of a load, until loads were measured.
        pinned: never evicted (``min_replicas >= 1`` counts as pinned).
        min_residency_s: least time that a busy model stays; None = the limit of all.
        idle_unload_s: retired after so long without use; None = never.
        keep_alive_s: compared by the ``ollama`` policy only.
        revision: of its files; another one clears what was learned of failures and sizes.
        resides: False for a remote model that holds no memory here: it is granted at once, always.
    """

    name: str
    demand: Resources = NOTHING
    pool: str = LOCAL_PROVIDER
    reload_s: float = 10.0
    pinned: bool = False
    min_residency_s: float | None = None
    idle_unload_s: float | None = None
    keep_alive_s: float = 300.0
    revision: str = ""
    resides: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings of rotation. Counts of 0 mean no limit; ``None`` switches the rule off.

    ``max_wait_s`` is when a waiting request makes busy models drain; ``load_timeout_s`` is what a load may take, and
    what a request may wait on top of ``max_wait_s`` while something is done for it. ``settle_s`` is how long a model
    counts as busy after a grant, until heartbeats tell. ``fresh_s`` after its load no replica is told to leave: whoever
    runs it still counts the requests that waited for it, and would start it anew; nor is one that was in use told so
    before ``echo_s`` after its leases were revoked, for the same reason. ``barrier_s`` after the start nothing
    is loaded or evicted. ``silence_s``: a replica that has said nothing for so long is taken for gone.
    ``ticket_ttl_s``: so is a request that nobody asked after.
    """

    enabled: bool = True
    max_queue: int = 256
    max_wait_s: float = 120.0
    load_timeout_s: float = 120.0
    max_local_models: int = 0
    max_models: int = 0
    max_parallel_loads: int = 0
    lease_ttl_s: float = 2.0
    lease_slack_s: float = 0.25
    min_residency_s: float = 10.0
    settle_s: float = 0.5
    fresh_s: float = 0.0
    echo_s: float = 0.0
    barrier_s: float = 3.0
    silence_s: float | None = 5.0
    ticket_ttl_s: float | None = None
    retry_attempts: int = 3
    retry_delay_s: float = 1.0
    retry_cap_s: float = 60.0
    warning: float = 0.80
    cleanup: float = 0.90
    critical: float = 0.95
    hysteresis: float = 0.05
    retire_s: float = 2.0
    history: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.warning < self.cleanup < self.critical <= 1:
            raise InvalidConfig(
                "The memory thresholds must be fractions with warning < cleanup < critical; they are "
                f"{self.warning:g}, {self.cleanup:g} and {self.critical:g}."
            )
        if self.barrier_s and self.barrier_s < self.lease_ttl_s + self.lease_slack_s:
            raise InvalidConfig("The barrier after a restart must outlast the leases that were given before it.")


# Events


@dataclass(frozen=True, slots=True)
class Registered:
    """A model is new or has changed."""

    model: Model


@dataclass(frozen=True, slots=True)
class Unregistered:
    """A model leaves the pool: its waiting requests move on, its replicas drain."""

    model: str
    reason: str = "it was removed from the pool"


@dataclass(frozen=True, slots=True)
class Recalled:
    """What an earlier router had learned of a registered model: pin, size, load time, failure (``Row.learned``)."""

    model: str
    learned: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """All nodes of one pool, as they are now."""

    pool: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody wants one of ``models``, the first that can be had. Asking again with the same ticket keeps the place.

    ``holder`` is the process that will hold the lease (an ingress replica). ``asked_at`` is given when a ticket is
    submitted again after a restart: it keeps its age. ``lease`` False only warms the model.
    """

    ticket: str
    models: tuple[str, ...]
    holder: str
    priority: Priority = Priority.HIGH
    caller: str = "anonymous"
    asked_at: float | None = None
    lease: bool = True


@dataclass(frozen=True, slots=True)
class Claimed:
    """The holder of a request that was granted while it waited has come for the grant, whose ``model`` and ``reason``
    these are. Its lease begins now: counted from the grant it might end while its holder believes in it."""

    request: Request
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller of a request that waits, or has not claimed its grant, has left."""

    ticket: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A replica says how it is. ``memory`` is measured; None = not known."""

    model: str
    replica: str
    node: str
    state: ModelState
    running: int = 0
    memory: float | None = None


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A load ended without a model. ``error`` is a ``RotundaError.to_dict()``; ``retryable`` there says whether it may
    heal by itself. The memory counts as taken until :class:`Gone`."""

    model: str
    error: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Gone:
    """A replica's process has ended and its memory is free; ``replica`` None = all replicas of the model."""

    model: str
    replica: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """A holder used its lease ``uses`` times since it last said so, and wants to keep it."""

    holder: str
    model: str
    uses: int = 1


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A holder will make no more calls under leases up to ``epoch``; ``in_flight`` of its calls still run."""

    holder: str
    model: str
    epoch: int
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """A holder gives its lease back unasked; its calls have ended."""

    holder: str
    model: str


@dataclass(frozen=True, slots=True)
class ScaleOut:
    """A model wants so many replicas; the answer is an :class:`Allow`."""

    model: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Somebody wants the model out of memory; running streams end first."""

    model: str
    reason: str = "an operator unloaded it"


@dataclass(frozen=True, slots=True)
class Pin:
    """A model may never (or may again) be evicted."""

    model: str
    pinned: bool = True


@dataclass(frozen=True, slots=True)
class EmergencyCleanup:
    """Every idle unpinned resident goes, now."""


@dataclass(frozen=True, slots=True)
class MemoryMeasured:
    """What is really in use of a node's memory, by whomever."""

    node: str
    used: float
    total: float


@dataclass(frozen=True, slots=True)
class ProviderDown:
    """The models of a pool cannot be reached."""

    pool: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProviderUp:
    """They can be reached again."""

    pool: str


@dataclass(frozen=True, slots=True)
class Retuned:
    """The settings have changed."""

    limits: Limits


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Registered
    | Unregistered
    | Recalled
    | CapacityChanged
    | Request
    | Claimed
    | Cancel
    | Heartbeat
    | LoadFailed
    | Gone
    | LeaseRenewed
    | Acknowledged
    | LeaseReleased
    | ScaleOut
    | Unload
    | Pin
    | EmergencyCleanup
    | MemoryMeasured
    | ProviderDown
    | ProviderUp
    | Retuned
    | Tick
)
