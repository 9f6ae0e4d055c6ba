"""Memory pressure of a node: three thresholds, each of which acts once when it is crossed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from serve_app.domain.rotation_events import Limits


class Level(IntEnum):
    CALM = 0
    WARNING = 1
    CLEANUP = 2
    CRITICAL = 3


@dataclass(slots=True)
class Pressure:
    """The level of one node. It rises with the measure at once and falls only ``hysteresis`` below a threshold."""

    level: Level = Level.CALM
    fraction: float | None = None
    """What was measured last."""

    def measure(self, fraction: float, limits: Limits) -> list[Level]:
        """Take the fraction of memory in use; returns the thresholds that were crossed upwards just now."""
        thresholds = (
            (Level.WARNING, limits.warning),
            (Level.CLEANUP, limits.cleanup),
            (Level.CRITICAL, limits.critical),
        )
        before, self.fraction = self.level, fraction
        reached = max((level for level, at in thresholds if fraction >= at), default=Level.CALM)
        kept = max(
            (level for level, at in thresholds if level <= before and fraction >= at - limits.hysteresis),
            default=Level.CALM,
        )
        self.level = max(reached, kept)
        return [level for level, _ in thresholds if before < level <= self.level]

    @property
    def stops_loads(self) -> bool:
        return self.level is Level.CRITICAL
