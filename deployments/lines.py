"""Which handle a call to a model goes over, and how a handle goes away: each one talks with Serve's controller all the
time, and each one that is made leaves something behind, in this process and in the controller, also when it is shut
(Ray 2.60)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.domain.catalog import Entry

IDLE_HANDLE_S = 60.0
"""A handle that was not used for so long is given up."""
LINGER_S = 3.0
"""A handle is kept for so long after its last call: a few of Serve's ``metrics_interval_s``."""

_leaving: set[asyncio.Task[None]] = set()


class Line:
    """A handle, and what runs over it."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle
        self.used_at = asyncio.get_running_loop().time()
        self.calls = 0
        self._given_up = False

    @contextlib.contextmanager
    def calling(self) -> Iterator[DeploymentHandle[Any]]:
        """Counts a call; the last one of a line that was given up closes it."""
        self.calls += 1
        try:
            yield self.handle
        finally:
            self.calls -= 1
            self.used_at = asyncio.get_running_loop().time()
            self._close()

    def give_up(self) -> None:
        """Make no more calls over it."""
        self._given_up = True
        self._close()

    def _close(self) -> None:
        """Left to itself, a handle whose calls have ended would talk with Serve's controller for ever."""
        if self._given_up and not self.calls:
            task = asyncio.get_running_loop().create_task(_shut(self.handle))
            _leaving.add(task)
            task.add_done_callback(_leaving.discard)


async def _shut(handle: DeploymentHandle[Any]) -> None:
    """It has to say that its queue is empty before it goes: Serve counts the last queue of a silent handle for ten
    seconds, and would start the model again for nobody."""
    await asyncio.sleep(LINGER_S)
    await handle.shutdown_async()


class Lines:
    """The lines of one process: one to each model's deployment for each kind of call."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, bool], Line] = {}

    def __repr__(self) -> str:
        return f"Lines({sorted(self._lines)})"

    def to(self, entry: Entry, stream: bool = False) -> Line:
        """The line to a model, for calls that are answered once or, with ``stream``, by a stream."""
        key, loop = (entry.application, stream), asyncio.get_running_loop()
        line = self._lines.get(key)
        if line is None:
            handle: DeploymentHandle[Any] = DeploymentHandle(entry.deployment, entry.application)
            line = self._lines[key] = Line(handle.options(stream=stream, response_serialization="pickle"))
            loop.call_later(IDLE_HANDLE_S, self._look, key, line)
        line.used_at = loop.time()
        return line

    @contextlib.contextmanager
    def calling(self, entry: Entry) -> Iterator[DeploymentHandle[Any]]:
        """The handle for a call that is answered once."""
        try:
            with self.to(entry).calling() as handle:
                yield handle
        except DeploymentUnavailableError as error:
            self.hear(entry, error)
            raise

    def hear(self, entry: Entry, error: Exception) -> None:
        """A call failed. A handle to an application that has gone stays useless, also when it is deployed anew under
        its name."""
        if isinstance(error, DeploymentUnavailableError):
            for stream in (True, False):
                self._drop((entry.application, stream))

    def _look(self, key: tuple[str, bool], line: Line) -> None:
        """Give the line up if it was not used for a while, else look again when it could be so."""
        if self._lines.get(key) is not line:
            return
        loop = asyncio.get_running_loop()
        rest = IDLE_HANDLE_S - (loop.time() - line.used_at)
        if line.calls or rest > 0:
            loop.call_later(IDLE_HANDLE_S if line.calls else rest, self._look, key, line)
        else:
            self._drop(key)

    def _drop(self, key: tuple[str, bool]) -> None:
        line = self._lines.pop(key, None)
        if line is not None:
            line.give_up()
