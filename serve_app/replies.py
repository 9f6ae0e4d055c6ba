"""One reply of a conversation: how it is wanted, and how it comes into being."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from serve_app.domain.conversation import Conversation, StoredImage, StoredMessage, StreamSession, TerminationReason
from serve_app.domain.errors import RotundaError
from serve_app.domain.events import Token
from serve_app.domain.generation import ContextPolicy, Delta, Image, Options, Priority
from serve_app.live import LiveStream
from serve_app.store.records import NewImage, Progress
from serve_app.telemetry.tracing import Trail


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of the sessions of one ingress; times in seconds."""

    tick_s: float = 0.1
    ownership_s: float = 5.0
    sweep_s: float = 5.0
    detach_grace_s: float = 60.0
    session_timeout_s: float = 600.0
    max_sessions: int = 1000
    max_history: int = 200


@dataclass(frozen=True, slots=True)
class Upload:
    """An image that came with a message: its verified content and the row that will stand for it."""

    image: Image
    row: NewImage


@dataclass(frozen=True, slots=True)
class NewReply:
    """A message for a conversation, and how its reply is wanted."""

    conversation: Conversation
    text: str
    model: str | None = None
    system_prompt: str | None = None
    uploads: tuple[Upload, ...] = ()
    image_warnings: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)
    priority: Priority = Priority.HIGH
    fallbacks: tuple[str, ...] = ()
    context_policy: ContextPolicy = "truncate"
    on_disconnect: Literal["cancel", "detach"] = "detach"
    caller: str = "anonymous"
    trace: Trail = field(default_factory=Trail.quiet)


class ImageUrls(Protocol):
    """Where a client finds a stored image; a private conversation's URL carries a token."""

    def __call__(self, image: StoredImage, private: bool) -> str: ...


class LiveReply:
    """One reply in the making. Its events are :attr:`stream`; :meth:`stop` ends it early."""

    def __init__(
        self, new: NewReply, session: StreamSession, user_message: StoredMessage, limits: SessionLimits
    ) -> None:
        self.new = new
        self.session = session
        self.user_message = user_message
        self.stream = LiveStream(self._readers_changed)
        self.failure: RotundaError | None = None
        self.message: StoredMessage | None = None
        self.stop_reason: TerminationReason | None = None
        self.done = asyncio.Event()
        self.model, self.provider = session.model, session.provider
        self.token_count = 0
        self._limits = limits
        self._parts: list[str] = []
        self._length = 0
        self._generation: asyncio.Task[Any] | None = None
        self._grace: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"LiveReply({self.session.id!r}, model={self.model!r}, tokens={self.token_count}, {self.stream!r})"

    @property
    def progress(self) -> Progress:
        return Progress(self.session.id, self.text, self.token_count, self.model, self.provider)

    @property
    def ending(self) -> bool:
        """Whether the generation is over and the end is being recorded."""
        return self._generation is not None and self._generation.done()

    @property
    def text(self) -> str:
        return "".join(self._parts)

    async def opened(self) -> None:
        """Return once the stream has begun; raise the error that came instead of it."""
        await self.stream.wait_beyond(0)
        if self.failure is not None and len(self.stream.events) == 1:
            raise self.failure

    def stop(self, reason: TerminationReason) -> None:
        """End the generation; the partial text is saved. Without effect on a reply that has ended."""
        if self.stop_reason is not None or self.ending:
            return
        self.stop_reason = reason
        if self._generation is not None:
            self._generation.cancel()

    def run(self, generation: asyncio.Task[Any]) -> None:
        self._generation = generation
        if self.stop_reason is None:
            self._readers_changed(0)
        else:
            generation.cancel()  # it was stopped before it began

    def add(self, delta: Delta) -> None:
        """Pass a delta on at once, and count its tokens."""
        self.token_count += len(delta.token_ids)
        if delta.text:
            self.stream.append(Token(delta.text, self._length))
            self._parts.append(delta.text)
            self._length += len(delta.text)

    def leave_alone(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _readers_changed(self, readers: int) -> None:
        self.leave_alone()
        if readers or self.done.is_set():
            return
        cancel = self.new.on_disconnect == "cancel"
        grace_s = 0.0 if cancel and self.stream.events else self._limits.detach_grace_s
        loop = asyncio.get_running_loop()
        self._grace = loop.call_later(grace_s, self.stop, TerminationReason.CLIENT_DISCONNECTED)
