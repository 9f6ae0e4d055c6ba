"""What the router, the ingresses and the replicas tell each other about who may call, and who may load. Plain values.

All of it is level-triggered: an answer that is lost is given again by the next call, so nothing depends on one message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.domain.rotation_state import EPOCH_BITS
from serve_app.domain.routing import Lease


@dataclass(frozen=True, slots=True)
class Report:
    """What the holder of leases says, from time to time and at once when it was told something.

    ``used``: models whose leases it wants to keep, with the number of calls since it last said so. ``stopped``: models
    that it will not call under leases up to the epoch given; ``running`` are its calls that still run. ``tickets``: its
    requests that wait.
    """

    holder: str
    used: Mapping[str, int] = field(default_factory=dict)
    stopped: Mapping[str, int] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    tickets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Orders:
    """The router's answer. ``revoked``: models with the epoch up to which leases have ended. ``stirred``: tickets that
    should ask again, because there is news or because the router does not know them. ``catalogue`` changes whenever a
    name may mean something else."""

    extended: tuple[Lease, ...] = ()
    revoked: Mapping[str, int] = field(default_factory=dict)
    stirred: tuple[str, ...] = ()
    catalogue: int = 0

    @property
    def urgent(self) -> bool:
        return bool(self.extended or self.revoked or self.stirred)


@dataclass(frozen=True, slots=True)
class Permit:
    """What the router allows the replicas of a model: how many there may be (0: leave), and which leases are theirs.

    ``wait``: not yet; ask again before loading.
    """

    granted: int
    epoch: int = 0
    wait: bool = False

    @property
    def generation(self) -> int:
        """Of the router that gave it: a later one is obeyed, an earlier one is not."""
        return self.epoch >> EPOCH_BITS
