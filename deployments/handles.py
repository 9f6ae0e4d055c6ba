"""Ray's handles as the protocols that serve_app knows; errors and trace context cross the border here.

Errors of ours travel as data, never as pickled exceptions: the calling side always sees the class it knows, and a
failure of Ray itself (a killed replica, a full queue) is told from a failure of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from serve_app.domain.catalog import Entry
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import (
    DeadlineExceeded,
    Internal,
    MemoryExceeded,
    ProviderUnavailable,
    QueueFull,
    RotundaError,
    error_from_dict,
)
from serve_app.domain.fleet import FleetView
from serve_app.domain.generation import Finish, GenerationRequest, Item
from serve_app.domain.leasing import Orders, Report
from serve_app.domain.rotation_view import HISTORY, RotationView
from serve_app.domain.routing import Admission, Ask
from serve_app.frames import unpack
from serve_app.inbox import Inbox, Mailbox
from serve_app.leases import RouterAway
from serve_app.telemetry.spans import SpanRow

logger = logging.getLogger(__name__)

ROUTER_TIMEOUT_S = 10.0
IDLE_HANDLE_S = 60.0
SWEEP_S = 5.0
LINGER_S = 3.0
"""A handle is kept for so long after its last call: a few of Serve's ``metrics_interval_s``."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of ours, on its way between two processes."""

    error: dict[str, Any]


def answering(method: Callable[..., Awaitable[Value]]) -> Callable[..., Awaitable[Value | Failure]]:
    """Make a replica's method answer its errors as :class:`Failure`; a fault is logged and masked."""

    @functools.wraps(method)
    async def answer(*args: Any, **kwargs: Any) -> Value | Failure:
        try:
            return await method(*args, **kwargs)
        except RotundaError as error:
            return Failure(error.to_dict())
        except Exception:
            logger.exception("%s failed", method.__qualname__)
            return Failure(Internal.masked().to_dict())

    return answer


async def forever(step: Callable[[], Awaitable[None]], interval_s: float) -> None:
    """Take ``step`` again and again; a fault in one is logged and ends that one only."""
    while True:
        try:
            await step()
        except Exception:
            logger.exception("%s failed", getattr(step, "__qualname__", step))
        await asyncio.sleep(interval_s)


def translate(error: Exception, name: str, provider: str) -> RotundaError:
    """What a failed call to ``name`` means for the one who called."""
    if isinstance(error, RotundaError):
        return error
    if isinstance(error, BackPressureError):
        return QueueFull(f"{name} has too many requests waiting. Try again soon.", provider, details={"retryAfterS": 1})
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return MemoryExceeded(f"{name} ran out of memory on its node.", provider)
    if isinstance(error, DeploymentUnavailableError):
        return ProviderUnavailable(f"{name} could not be started. Try again soon.", provider)
    if isinstance(error, ray.exceptions.GetTimeoutError | TimeoutError):
        return DeadlineExceeded.during("connect", ROUTER_TIMEOUT_S, provider)
    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.RayError):
        return ProviderUnavailable(f"The replica that served {name} went away. Try again.", provider)
    return Internal.masked()


def apart(method: Any, *args: Any) -> Any:
    """Call a deployment's method outside the context of the request at hand; returns what ``method.remote`` does.

    When a client goes away, Serve cancels every call that it takes for a child of that client's request. A reply
    outlives its request, and what nobody waits for any more is cancelled here by name.
    """
    return contextvars.Context().run(method.remote, *args)


_leaving: set[asyncio.Task[None]] = set()


def let_go(handle: DeploymentHandle[Any]) -> None:
    """Give a handle up whose calls have ended. Left to itself, it would talk with Serve's controller for ever.

    It has to say that its queue is empty before it goes: Serve counts the last queue of a silent handle for ten
    seconds, and would start the model again for nobody.
    """
    task = asyncio.get_running_loop().create_task(_shut(handle))
    _leaving.add(task)
    task.add_done_callback(_leaving.discard)


async def _shut(handle: DeploymentHandle[Any]) -> None:
    await asyncio.sleep(LINGER_S)
    await handle.shutdown_async()


class RouterHandle:
    """The router deployment as :class:`serve_app.backend.Router`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def admit(self, ask: Ask) -> Admission:
        return await self._call("admit", ask)  # type: ignore[no-any-return]

    async def cancel(self, ticket: str) -> None:
        await self._call("cancel", ticket)

    async def sync(self, report: Report) -> Orders:
        return await self._call("sync", report)  # type: ignore[no-any-return]

    async def view(self) -> FleetView:
        return await self._call("view")  # type: ignore[no-any-return]

    async def rotation(self, history: int = HISTORY) -> RotationView:
        return await self._call("rotation", history)  # type: ignore[no-any-return]

    async def command(self, action: str, model: str = "", **arguments: Any) -> dict[str, Any]:
        return await self._call("command", action, model, arguments)  # type: ignore[no-any-return]

    async def traces(self, limit: int, session: str | None) -> list[dict[str, Any]] | None:
        return await self._call("traces", limit, session)  # type: ignore[no-any-return]

    async def trace(self, trace_id: str) -> list[SpanRow] | None:
        return await self._call("trace", trace_id)  # type: ignore[no-any-return]

    async def figures(self) -> bytes:
        return await self._call("figures")  # type: ignore[no-any-return]

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            async with asyncio.timeout(ROUTER_TIMEOUT_S):
                answer = await apart(getattr(self._handle, method), *args)
        except Exception as error:
            logger.warning("the router did not answer %s: %r", method, error)
            raise RouterAway("The router does not answer. Try again soon.", "rotunda") from error
        if isinstance(answer, Failure):
            raise error_from_dict(answer.error)
        return answer


@dataclass(eq=False, slots=True)
class _Line:
    """A handle, and what runs over it."""

    handle: DeploymentHandle[Any]
    used_at: float = 0.0
    calls: int = 0
    given_up: bool = False

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Counts a call; the last one of a line that was given up closes it."""
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1
            self.used_at = asyncio.get_running_loop().time()
            self._close()

    def give_up(self) -> None:
        """Make no more calls over it."""
        self.given_up = True
        self._close()

    def _close(self) -> None:
        if self.given_up and not self.calls:
            let_go(self.handle)


_kept: dict[str, _Line] = {}
"""The handles of :func:`handle_on`, by application."""


@contextlib.contextmanager
def handle_on(entry: Entry) -> Iterator[DeploymentHandle[Any]]:
    """A handle for a call to a model's deployment now and then. It is kept for the next call for a while: each one that
    is made leaves something behind, in this process and in Serve's controller, also when it is shut (Ray 2.60)."""
    application = entry.application
    line = _kept.get(application)
    if line is None:
        line = _kept[application] = _Line(DeploymentHandle(entry.deployment, application))
    try:
        with line.calling():
            yield line.handle
    except DeploymentUnavailableError:
        _drop(application, line)
        raise
    finally:
        asyncio.get_running_loop().call_later(IDLE_HANDLE_S, _drop_idle, application, line, line.used_at)


def _drop_idle(application: str, line: _Line, used_at: float) -> None:
    if not line.calls and line.used_at == used_at:
        _drop(application, line)


def _drop(application: str, line: _Line) -> None:
    if _kept.get(application) is line:
        del _kept[application]
        line.give_up()


class ModelHandles:
    """The models' deployments as :class:`serve_app.backend.Backend`.

    Every request has a call of its own, read by a task of its own; what the calls bring are frames with the items of
    all requests, which the inbox sorts (serve_app.inbox).

    Args:
        ingress: this ingress, unique among all of them.
    """

    def __init__(self, ingress: str) -> None:
        self._ingress = ingress
        self._inbox = Inbox()
        self._lines: dict[tuple[str, bool], _Line] = {}
        self._readers: set[asyncio.Task[None]] = set()

    async def sweep(self) -> None:
        """Give up the handles that were not used for a while: each talks with Serve's controller all the time."""
        now = asyncio.get_running_loop().time()
        for key, line in list(self._lines.items()):
            if now - line.used_at > IDLE_HANDLE_S and not line.calls:
                self._lines.pop(key).give_up()

    async def stream(self, entry: Entry, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]:
        """Yield the replica's items; closing the iterator cancels the call, and with it the generation."""
        # Another attempt is another stream: what the first one still brings must not mix with it.
        request = replace(request, request_id=f"{request.request_id}-{secrets.token_hex(4)}")
        mailbox = self._inbox.open(request.request_id)
        line = self._line(entry, stream=True)
        call = apart(line.handle.generate, request, epoch, self._ingress)
        reader = asyncio.get_running_loop().create_task(self._read(call, line, entry, mailbox))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        whole = False
        try:
            async for item in mailbox:
                whole = isinstance(item, Finish)
                yield item
        finally:
            self._inbox.close(request.request_id)
            if not whole:
                # A call that ended well is left to end by itself: it may be carrying frames of others.
                call.cancel()
                reader.cancel()

    async def embed(self, entry: Entry, request: EmbeddingRequest, epoch: int) -> Embeddings:
        """One vector for each text."""
        line = self._line(entry, stream=False)
        try:
            with line.calling():
                answer = await apart(line.handle.embed, request, epoch)
        except Exception as error:
            self._forget(entry, error)
            raise translate(error, entry.id, entry.provider) from error
        if isinstance(answer, Failure):
            raise error_from_dict(answer.error)
        return answer  # type: ignore[no-any-return]

    async def _read(self, call: Any, line: _Line, entry: Entry, mailbox: Mailbox) -> None:
        try:
            with line.calling():
                async for data in call:
                    self._inbox.deliver(unpack(data))
            mailbox.call_ended(asyncio.get_running_loop().time())
        except (asyncio.CancelledError, RequestCancelledError) as end:
            # By us, when nobody reads any more; should Ray do it, the reader must not wait for what never comes.
            mailbox.fail(ProviderUnavailable(f"The call to {entry.id} was cut off. Try again.", entry.provider))
            if isinstance(end, asyncio.CancelledError):
                raise
        except Exception as error:
            self._forget(entry, error)
            logger.warning("a call to %s failed: %r", entry.application, error)
            mailbox.fail(translate(error, entry.id, entry.provider))

    def _line(self, entry: Entry, stream: bool) -> _Line:
        key = (entry.application, stream)
        if key not in self._lines:
            handle: DeploymentHandle[Any] = DeploymentHandle(entry.deployment, entry.application)
            self._lines[key] = _Line(handle.options(stream=stream, response_serialization="pickle"))
        self._lines[key].used_at = asyncio.get_running_loop().time()
        return self._lines[key]

    def _forget(self, entry: Entry, error: Exception) -> None:
        """A handle to an application that has gone stays useless, also when it is deployed anew under its name."""
        if isinstance(error, DeploymentUnavailableError):
            for stream in (True, False):
                line = self._lines.pop((entry.application, stream), None)
                if line is not None:
                    line.give_up()
