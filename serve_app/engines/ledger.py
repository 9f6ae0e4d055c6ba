"""What engines of every kind share: their counters and their waiting line."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Generic, Literal, TypeVar

from serve_app.domain.errors import ProviderUnavailable, QueueFull
from serve_app.domain.generation import Priority
from serve_app.engines.base import Counters, EngineOptions

Outcome = Literal["finished", "cancelled", "failed"]
Place = Literal["waiting", "running"]
T = TypeVar("T")


class Ledger:
    """Counters that add up at every moment: requests = waiting + running + finished + cancelled + failed.

    Written by the event loop and by the thread that computes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = asdict(Counters())
        self._told: Counters | None = None
        """What :meth:`snapshot` gave last; None when something was counted since."""

    def __repr__(self) -> str:
        return f"Ledger({self.snapshot()})"

    def snapshot(self) -> Counters:
        with self._lock:
            if self._told is None:
                self._told = Counters(**self._counts)
            return self._told

    def enter(self) -> None:
        """A request came and waits (a refused one only to fail at once)."""
        self._add(requests=1, waiting=1)

    def start(self) -> None:
        self._add(waiting=-1, running=1)

    def leave(self, place: Place, outcome: Outcome) -> None:
        self._add(**{place: -1, outcome: 1})

    def count(self, prompt_tokens: int = 0, completion_tokens: int = 0, tokens_after_cancel: int = 0) -> None:
        self._add(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, tokens_after_cancel=tokens_after_cancel
        )

    def _add(self, **changes: int) -> None:
        with self._lock:
            for name, change in changes.items():
                self._counts[name] += change
            self._told = None


def shutting_down() -> ProviderUnavailable:
    """What requests end with when their engine closes."""
    return ProviderUnavailable("The replica is shutting down.")


def check_room(counters: Counters, options: EngineOptions) -> None:
    """Refuse the newest of ``counters.waiting`` when it is one too many.

    Raises:
        QueueFull: ``details["retryAfterS"]`` is a guess: a second for each round of those ahead.
    """
    ahead = counters.waiting - 1
    if ahead + counters.running < options.max_concurrency + options.max_queue:
        return
    after = max(1, min(60, ahead // max(1, options.max_concurrency)))
    raise QueueFull(
        f"{ahead} requests already wait for this model. Try again in {after} s.",
        details={"retryAfterS": after, "waiting": ahead},
    )


class Line(Generic[T]):
    """Who waits: by priority, then by age since arrival. Not locked: one owner."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, T]] = []
        self._count = itertools.count()

    def __repr__(self) -> str:
        return f"Line({len(self._heap)})"

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[T]:
        return (item for *_, item in sorted(self._heap, key=lambda entry: entry[:3]))

    def push(self, item: T, priority: Priority, arrived: float) -> None:
        """``arrived``: on any clock. Prompts are made side by side, so a younger request may be ready first."""
        heapq.heappush(self._heap, (int(priority), arrived, next(self._count), item))

    def first(self) -> T | None:
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> T:
        return heapq.heappop(self._heap)[-1]

    def remove(self, item: T) -> bool:
        """Take somebody out; False when they were not there."""
        for index, entry in enumerate(self._heap):
            if entry[-1] is item:
                del self._heap[index]
                heapq.heapify(self._heap)
                return True
        return False
