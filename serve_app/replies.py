"""One reply of a conversation: how it is wanted, and how it comes into being."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.domain.conversation import (
    Conversation,
    SessionStatus,
    StoredImage,
    StoredMessage,
    StreamSession,
    TerminationReason,
)
from serve_app.domain.errors import RotundaError, error_from_dict
from serve_app.domain.events import Event, Numbered, Token
from serve_app.domain.generation import ContextPolicy, Delta, Image, Options, Priority
from serve_app.domain.stream_log import Entry, LogRow, Origin, Transcript, rows_of
from serve_app.domain.wanted import OnDisconnect, Wanted
from serve_app.live import LiveStream
from serve_app.store.records import NewConversation, NewImage
from serve_app.telemetry.tracing import Trail


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of the sessions of one ingress; times in seconds.

    ``max_unlogged``: events of a stream that wait for the store before the stream waits too. ``record_s``: how long the
    end of a stream is tried to be recorded. ``log_retention_s``: how long a log is kept after that.
    """

    tick_s: float = 0.1
    ownership_s: float = 5.0
    sweep_s: float = 5.0
    detach_grace_s: float = 60.0
    session_timeout_s: float = 600.0
    max_sessions: int = 1000
    max_history: int = 200
    max_unlogged: int = 4096
    record_s: float = 120.0
    log_retention_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Upload:
    """An image that came with a message: its verified content and the row that will stand for it."""

    image: Image
    row: NewImage


@dataclass(frozen=True, slots=True)
class NewReply:
    """A message for a conversation, and how its reply is wanted. ``fresh``: the conversation begins with it."""

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
    on_disconnect: OnDisconnect = "detach"
    caller: str = "anonymous"
    trace: Trail = field(default_factory=Trail.quiet)
    idempotency_key: str | None = None
    fingerprint: str | None = None
    fresh: NewConversation | None = None

    def wanted(self) -> Wanted:
        """What is kept with the session."""
        return Wanted(
            model=self.model or self.conversation.llm_model or None,
            system=self.system_prompt or self.conversation.system_prompt or "",
            images=bool(self.uploads),
            options=self.options,
            priority=self.priority,
            fallbacks=self.fallbacks,
            context_policy=self.context_policy,
            on_disconnect=self.on_disconnect,
            caller=self.caller,
            trace=self.trace.carrier(),
            draw_seed=secrets.randbits(63),
        )


class ImageUrls(Protocol):
    """Where a client finds a stored image; a private conversation's URL carries a token."""

    def __call__(self, image: StoredImage, private: bool) -> str: ...


class LiveReply:
    """One reply in the making. Its events are :attr:`stream`; :meth:`stop` ends it early.

    Every event is given to the readers at once, and waits in :meth:`batch` for the log.

    Args:
        conversation: it belongs to.
        session: as the store keeps it.
        user_message: the one that it answers.
        wanted: how.
        trace: of the request that began it.
        limits: of this ingress.
        told: what another ingress has made of it.
        warnings: about the images of the message.
    """

    def __init__(
        self,
        conversation: Conversation,
        session: StreamSession,
        user_message: StoredMessage,
        wanted: Wanted,
        trace: Trail,
        limits: SessionLimits,
        *,
        told: Transcript | None = None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.conversation, self.session, self.user_message = conversation, session, user_message
        self.wanted, self.trace, self.warnings = wanted, trace, warnings
        self.told = told
        self.stream = LiveStream(self._readers_changed, told)
        self.failure: RotundaError | None = None
        self.message_id: str | None = None
        self.message: StoredMessage | None = None
        self.stop_reason: TerminationReason | None = None
        self.moved = False
        self.done = asyncio.Event()
        self.model, self.provider = session.model, session.provider
        self.revision: str | None = None
        self.attempt = told.origin.attempt if told else 0
        self.prompt_tokens: int | None = None
        self.token_count = told.token_count if told else 0
        self.leaving = False
        self.hurry: Callable[[], None] = lambda: None
        self._limits = limits
        self._parts: list[str] = [told.text] if told else []
        self._held: tuple[int, ...] = ()
        self._unlogged: list[Entry] = []
        self._unlogged_from = self.stream.length
        self._sending: list[LogRow] = []
        self._room = asyncio.Event()
        self._generation: asyncio.Task[Any] | None = None
        self._grace: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"LiveReply({self.session.id!r}, model={self.model!r}, tokens={self.token_count}, {self.stream!r})"

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
        self._cancel()

    def move(self) -> None:
        """End the generation without an end of the stream: another ingress goes on with it."""
        self.moved = True
        self.trace.hand_over()
        self._cancel()

    def run(self, generation: asyncio.Task[Any]) -> None:
        self._generation = generation
        if self.stop_reason is None and not self.moved:
            self._readers_changed(0)
        else:
            generation.cancel()  # it was stopped before it began

    def tried(self, model: str, provider: str) -> None:
        """Another attempt begins, with this model."""
        self.model, self.provider, self.revision = model, provider, None
        self.attempt += 1

    def add(self, delta: Delta) -> None:
        """Pass a delta on at once, and count its tokens."""
        self.token_count += delta.tokens
        self._held += delta.token_ids
        if delta.text:
            first = not self._parts
            self.emit(Token(delta.text, self.stream.length))
            self._parts.append(delta.text)
            if first:
                self.hurry()

    def emit(self, event: Event) -> None:
        """Add an event to the stream; the ids of tokens whose text was held back until now go with it."""
        ids: tuple[int, ...] = ()
        if isinstance(event, Token):
            ids, self._held = self._held, ()
        numbered = self.stream.append(event)
        self._unlogged.append(Entry(numbered, self._origin(ids)))

    def batch(self) -> list[LogRow]:
        """The rows to write next; the same until :meth:`logged` says that they were written."""
        if not self._sending:
            self._sending = rows_of(self._unlogged, self._unlogged_from, self.session.epoch)
            self._unlogged, self._unlogged_from = [], self.stream.length
        return self._sending

    def logged(self) -> None:
        """The store has the last batch."""
        self._sending = []
        self._room.set()

    def rest(self, *end: Event) -> list[LogRow]:
        """All that the log lacks, with the end of the stream, which readers are told of only when it is written."""
        entries = list(self._unlogged)
        entries += [Entry(Numbered(len(self.stream.events) + 1, event), self._origin(())) for event in end]
        return self._sending + rows_of(entries, self._unlogged_from, self.session.epoch)

    async def room(self) -> None:
        """Wait while the log is too far behind: a slow store delays itself first, then the model."""
        while self._backlog >= self._limits.max_unlogged and not self.done.is_set():
            self._room.clear()
            await self._room.wait()

    def ended_as(self, session: StreamSession) -> None:
        """Take over the end that another ingress recorded."""
        self.message_id, self.model, self.provider = session.message_id, session.model, session.provider
        if session.status is SessionStatus.ERROR:
            text = session.error_message or "The reply failed."
            self.failure = error_from_dict({"code": session.error_code, "message": text, "provider": session.provider})
        elif session.status is SessionStatus.TERMINATED:
            self.stop_reason = TerminationReason(session.termination_reason or TerminationReason.ERROR)

    def leave_alone(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    @property
    def _backlog(self) -> int:
        return len(self._unlogged) + (self._sending[-1].seq_to - self._sending[0].seq + 1 if self._sending else 0)

    def _origin(self, ids: tuple[int, ...]) -> Origin:
        return Origin(self.model, self.provider, self.attempt, self.revision, ids)

    def _cancel(self) -> None:
        if self._generation is not None:
            self._generation.cancel()

    def _readers_changed(self, readers: int) -> None:
        self.leave_alone()
        if readers or self.done.is_set() or self._generation is None:
            return
        # Who follows an adopted stream has lost its connection without leaving.
        cancel = self.wanted.on_disconnect == "cancel" and self.told is None
        grace_s = 0.0 if cancel and self.stream.events else self._limits.detach_grace_s
        loop = asyncio.get_running_loop()
        self._grace = loop.call_later(grace_s, self.stop, TerminationReason.CLIENT_DISCONNECTED)
