"""Which models had no room a moment ago, so that the next request is refused while that is cheap."""

from __future__ import annotations

from collections.abc import Callable

from serve_app.domain.errors import QueueFull, error_from_dict

FULL_S = 0.2
"""A model whose line was full is taken for full until a request that this gateway sent there ends, and no longer than
this: other gateways fill and empty the line too."""


class Fullness:
    """What the models of one gateway have answered.

    Args:
        clock: monotonic seconds.
        running: how many calls of this gateway to a model run. Without one nobody would say that there is room again.
    """

    def __init__(self, clock: Callable[[], float], running: Callable[[str], int]) -> None:
        self._clock = clock
        self._running = running
        self._full: dict[str, tuple[float, QueueFull]] = {}

    def __repr__(self) -> str:
        return f"Fullness({sorted(self._full)})"

    def check(self, model: str) -> None:
        """Raise what the model would answer, if it would surely have no room."""
        until, refusal = self._full.get(model, (0.0, None))
        if refusal is not None and self._clock() < until and self._running(model):
            raise error_from_dict(refusal.to_dict())

    def refused(self, model: str, error: QueueFull) -> None:
        """The model has no room; hearing the same from :meth:`check` does not make it longer."""
        now = self._clock()
        if now >= self._full.get(model, (0.0, None))[0]:
            self._full[model] = now + FULL_S, error

    def left(self, model: str) -> None:
        """A request of this gateway has ended there."""
        self._full.pop(model, None)
