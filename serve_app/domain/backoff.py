"""When to try again: exponential backoff with full jitter (M. Brooker, "Exponential Backoff And Jitter", AWS, 2015)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """``attempts`` tries in all; before try n+1 a wait drawn from [0, min(cap_s, base_s * 2**(n-1))]."""

    attempts: int = 3
    base_s: float = 0.2
    cap_s: float = 5.0

    def delay_s(self, failures: int, draw: Callable[[], float]) -> float | None:
        """Seconds to wait after ``failures`` (>= 1) failed tries, or None when there are no more tries.

        Args:
            failures: tries that have failed so far.
            draw: a number from [0, 1), for instance ``random.random``.
        """
        if failures >= self.attempts:
            return None
        return float(draw() * min(self.cap_s, self.base_s * 2 ** (failures - 1)))
