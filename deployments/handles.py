"""Ray's handles as the protocols that serve_app knows; errors and trace context cross the border here.

Errors of ours travel as data, never as pickled exceptions: the calling side always sees the class it knows, and a
failure of Ray itself (a killed replica, a full queue) is told from a failure of the model.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from deployments.lines import Line, Lines
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
        self._lines = Lines()
        self._readers: set[asyncio.Task[None]] = set()

    async def stream(self, entry: Entry, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]:
        """Yield the replica's items; closing the iterator cancels the call, and with it the generation."""
        # Another attempt is another stream: what the first one still brings must not mix with it.
        request = replace(request, request_id=f"{request.request_id}-{secrets.token_hex(4)}")
        mailbox = self._inbox.open(request.request_id)
        line = self._lines.to(entry, stream=True)
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
        line = self._lines.to(entry, stream=False)
        try:
            with line.calling():
                answer = await apart(line.handle.embed, request, epoch)
        except Exception as error:
            self._lines.hear(entry, error)
            raise translate(error, entry.id, entry.provider) from error
        if isinstance(answer, Failure):
            raise error_from_dict(answer.error)
        return answer  # type: ignore[no-any-return]

    async def _read(self, call: Any, line: Line, entry: Entry, mailbox: Mailbox) -> None:
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
            self._lines.hear(entry, error)
            logger.warning("a call to %s failed: %r", entry.application, error)
            mailbox.fail(translate(error, entry.id, entry.provider))
