"""What a request waits for until it may run, as its span tells it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from serve_app.domain.events import Loading, Queued
from serve_app.telemetry import semconv
from serve_app.telemetry.tracing import Trail


class Wait:
    """The span ``rotation.wait``: an event whenever the reason changes, and at the end the reason that lasted longest.

    Args:
        trail: the span.
        clock: monotonic seconds.
    """

    def __init__(self, trail: Trail, clock: Callable[[], float]) -> None:
        self._trail = trail
        self._clock = clock
        self._reason: str | None = None
        self._since = clock()
        self._lasted: dict[str, float] = defaultdict(float)

    def heard(self, news: Queued | Loading) -> None:
        """A client was told this."""
        if isinstance(news, Queued):
            self._trail.note({semconv.POSITION: news.position})
            self._because(news.reason)
        else:
            self._trail.note({semconv.EVICTING: list(news.evicting) or None})
            self._because(f"{news.model} is loaded")

    def end(self) -> None:
        """The wait is over."""
        self._count()
        if self._lasted:
            self._trail.note({semconv.REASON: max(self._lasted, key=lambda reason: self._lasted[reason])})

    def _because(self, reason: str) -> None:
        if reason != self._reason:
            self._count()
            self._reason = reason
            self._trail.event("waits", {semconv.REASON: reason})

    def _count(self) -> None:
        now = self._clock()
        if self._reason is not None:
            self._lasted[self._reason] += now - self._since
        self._since = now
