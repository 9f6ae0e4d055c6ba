"""What the parts of rotation share: the tables, the clock, and the two places where decisions leave their mark."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from serve_app.domain.eviction import COST_AWARE, Policy
from serve_app.domain.popularity import Popularity
from serve_app.domain.pressure import Pressure
from serve_app.domain.queue import Line
from serve_app.domain.residency import Residency
from serve_app.domain.rotation_effects import Decision, Effect
from serve_app.domain.rotation_events import Limits

EPOCH_BITS = 32
"""An epoch is the router's generation followed by a counter of so many bits: a later router's are always greater."""


@dataclass(slots=True)
class State:
    """Everything that rotation knows; ``stirred`` says that something changed by which the line may move."""

    limits: Limits
    policy: Policy = COST_AWARE
    generation: int = 1
    now: float = 0.0
    barrier_until: float = float("-inf")
    """Until then nothing is loaded or retired: residents and leases of an earlier router may still turn up."""
    residency: Residency = field(default_factory=Residency)
    line: Line = field(default_factory=Line)
    popularity: Popularity = field(default_factory=Popularity)
    pressures: dict[str, Pressure] = field(default_factory=dict)
    down: dict[str, str] = field(default_factory=dict)
    """Pools that cannot be reached, and why."""
    effects: list[Effect] = field(default_factory=list)
    history: deque[Decision] = field(default_factory=deque)
    uses: deque[Decision] = field(default_factory=deque)
    """Calls under leases, which nobody decided: apart, because there are so many that nothing else would be kept."""
    noted: int = 0
    """Counts the decisions ever written into the history."""
    stirred: bool = False
    _epochs: int = 0

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def note(
        self,
        action: str,
        model: str,
        reason: str,
        victims: tuple[str, ...] = (),
        duration_s: float | None = None,
        caller: str = "",
        times: int = 1,
    ) -> None:
        """Write a decision into the history."""
        self.history.append(Decision(self.now, action, model, reason, victims, duration_s, caller, times))
        self.noted += 1
        while len(self.history) > self.limits.history:
            self.history.popleft()

    def note_use(self, model: str, holder: str, times: int) -> None:
        """Remember calls of a holder under its lease, for whoever replays what happened."""
        self.uses.append(Decision(self.now, "used", model, f"calls of {holder} under its lease", times=times))
        while len(self.uses) > self.limits.history:
            self.uses.popleft()

    @property
    def epoch(self) -> int:
        """The newest that was given out."""
        return (self.generation << EPOCH_BITS) + self._epochs

    def next_epoch(self) -> int:
        self._epochs += 1
        return self.epoch

    @property
    def waits_for_news(self) -> bool:
        return self.now < self.barrier_until

    def stir(self) -> None:
        """Residents, demands or decided loads have changed: sums are stale and the line may move."""
        self.residency.changed()
        self.stirred = True

    @property
    def stopped(self) -> frozenset[str]:
        """Nodes on which no load may start, for want of memory."""
        return frozenset(node for node, pressure in self.pressures.items() if pressure.stops_loads)
