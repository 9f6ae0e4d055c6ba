"""The thread in which a model computes: requests join and leave it between steps.

It knows no torch. A :class:`Decoder` does the arithmetic: all of them in one forward pass
(:mod:`serve_app.engines.slots`), or one request after the other within a step (:mod:`serve_app.engines.decoding`);
the worker cannot tell.

One turn of the loop: drop who was cancelled, admit newcomers, let the decoder read on in their prompts and give those
who run a token each. What it computes together is sent as one hand-over to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.domain.errors import Internal, ProviderUnavailable, RotundaError
from serve_app.domain.generation import EngineTiming, Finish, FinishReason, GenerationRequest, Item, Usage
from serve_app.engines.faults import translate
from serve_app.engines.ledger import Ledger, Line, shutting_down
from serve_app.engines.prompt import Prompt
from serve_app.engines.reply import ReplyStream

log = logging.getLogger(__name__)

JOIN_S = 30.0
MAX_BROKEN = 3
"""Passes that fail whole, one after the other, before the engine calls itself unhealthy."""
Outgoing = Item | RotundaError


@dataclass(eq=False, slots=True)
class Job:
    """One request in the worker. ``state`` is the decoder's own. ``tokens`` are those of the reply, beginning with
    ``prompt.begun``. ``cached``: tokens of the prompt that the decoder need not read."""

    request: GenerationRequest
    prompt: Prompt
    stream: ReplyStream
    loop: asyncio.AbstractEventLoop
    arrived: float
    items: asyncio.Queue[Outgoing] = field(default_factory=asyncio.Queue)
    state: Any = None
    tokens: list[int] = field(init=False)
    cached: int = 0
    started: float = 0.0
    first: float = 0.0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.begun)

    def __repr__(self) -> str:
        return f"Job({self.request.request_id!r}, {len(self.prompt.ids)} + {len(self.tokens)} tokens)"

    @property
    def over(self) -> FinishReason | None:
        """How it ended before it began, when what was made elsewhere is the whole reply already."""
        if self.stream.complete:
            return self.stream.reason(FinishReason.STOP)
        return FinishReason.LENGTH if self.prompt.exhausted else None

    @property
    def matched(self) -> str | None:
        """The stop string of the request's that ended it."""
        return self.stream.matched if self.stream.matched in self.request.options.stop else None

    @property
    def room(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.prompt.ids) + self.prompt.max_tokens


class Decoder(Protocol):
    """The arithmetic. All calls come from the worker's thread."""

    @property
    def description(self) -> str:
        """How it computes, and why so."""
        ...

    @property
    def places(self) -> int | None:
        """Jobs that it can hold at once; None for any number."""
        ...

    def turn(self, reading: Sequence[Job], running: Sequence[Job]) -> Iterator[Mapping[Job, int | Exception]]:
        """Read on in the prompts of newcomers, oldest first, as far as suits those who run, and give each of these its
        next token. Yields outcomes as they are ready: a newcomer's first token once its prompt is read, and why
        somebody cannot go on. Raises only when none of those without an outcome can."""
        ...

    def ends(self, token: int) -> bool:
        """Whether the token ends a reply."""
        ...

    def release(self, job: Job) -> None:
        """Forget a job."""
        ...


class Worker:
    """Owns the thread.

    Args:
        max_running: jobs that compute at once.
        max_tokens: tokens that they may come to hold together (:func:`serve_app.engines.memory.kv_tokens`).
        stall_s: a step that takes longer means that the engine is lost.
    """

    def __init__(
        self, decoder: Decoder, ledger: Ledger, max_running: int, max_tokens: int, stall_s: float = 600.0
    ) -> None:
        self._decoder = decoder
        self._ledger = ledger
        self._max_running = min(max_running, decoder.places or max_running)
        self._max_tokens = max_tokens
        self._stall_s = stall_s
        self._line: Line[Job] = Line()
        self._reading: list[Job] = []
        self._running: list[Job] = []
        self._outbox: list[tuple[Job, Outgoing]] = []
        self._wake = threading.Condition()
        self._ending: Callable[[], RotundaError] | None = None
        self._busy_since: float | None = None
        self._broken = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        now = f"{len(self._running)} running, {len(self._reading)} reading"
        return f"Worker({now}, {self._line!r}, ending={self._ending is not None})"

    # From the event loop ---------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Put a job in the line. Its items, and its error if it has one, come through ``job.items``."""
        with self._wake:
            self.check_health()
            self._line.push(job, job.request.priority, job.arrived)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody reads the job any more; a running one stops before its next step. Idempotent."""
        with self._wake:
            job.cancelled = True
            if self._line.remove(job):
                self._ledger.leave("waiting", "cancelled")

    def check_health(self) -> None:
        """Raise what new jobs are refused with."""
        if self._ending is not None:
            raise self._ending()
        busy = self._busy_since
        if busy is not None and time.monotonic() - busy > self._stall_s:
            raise ProviderUnavailable("The model has stopped answering. Its replica will be replaced.")
        if self._broken >= MAX_BROKEN:
            raise ProviderUnavailable("The model fails again and again. Its replica will be replaced.")

    def close(self) -> None:
        """End every job with ``ProviderUnavailable`` and join the thread: blocks for a step at most."""
        with self._wake:
            self._ending = self._ending or shutting_down
            self._wake.notify()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            log.error("the engine's thread is still in a step after %g s", JOIN_S)

    # In the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except Exception:  # a fault of ours: the thread is lost, so the engine must say so and end what it holds
            log.exception("the engine's thread failed")
            self._ending = Internal.masked
        with self._wake:
            self._end_all(self._ending or shutting_down)
        self._post()

    def _wait(self) -> bool:
        with self._wake:
            self._busy_since = None
            while not self._ending and not self._line and not self._held:
                self._wake.wait()
            self._busy_since = time.monotonic()
            return self._ending is None

    def _turn(self) -> None:
        for job in [job for job in self._held if job.cancelled]:
            self._drop(job)
            self._ledger.leave("running", "cancelled")
        while self._admit():
            pass
        if held := self._held:
            self._compute(held)

    def _compute(self, held: Sequence[Job]) -> None:
        turn = iter(self._decoder.turn(self._reading.copy(), self._running.copy()))
        left = set(held)
        while True:
            try:
                outcomes = next(turn, None)
            except Exception as fault:  # the border to the libraries
                self._broken += 1
                outcomes = dict.fromkeys((job for job in held if job in left), fault)
            if outcomes is None:
                return
            left -= outcomes.keys()
            self._settle(outcomes)
            self._post()

    def _settle(self, outcomes: Mapping[Job, int | Exception]) -> None:
        made = [job for job, token in outcomes.items() if isinstance(token, int)]
        if made:
            self._broken = 0
        new = [job for job in made if job in self._reading]
        for job in new:
            job.first = job.request.marks.first = time.monotonic()
            self._reading.remove(job)
            self._running.append(job)
        self._ledger.count(
            prompt_tokens=sum(len(job.prompt.ids) for job in new),
            completion_tokens=len(made),
            tokens_after_cancel=sum(job.cancelled for job in made),
        )
        for job, token in outcomes.items():
            if isinstance(token, Exception):
                self._fail(job, token)
            else:
                self._take(job, token)

    @property
    def _held(self) -> list[Job]:
        return [*self._running, *self._reading]

    def _admit(self) -> bool:
        """Let the first in the line in, if there is room for it; nobody overtakes it."""
        with self._wake:
            job, held = self._line.first(), self._held
            if job is None or len(held) >= self._max_running:
                return False
            if held and sum(other.room for other in held) + job.room > self._max_tokens:
                return False
            self._reading.append(self._line.pop())
            self._ledger.start()
        job.started = job.request.marks.started = time.monotonic()
        return True

    def _take(self, job: Job, token: int) -> None:
        """Turn a token into text, and see whether it was the last."""
        job.tokens.append(token)
        if job.cancelled:
            return
        try:
            ended = self._decoder.ends(token)
            if not ended and (delta := job.stream.push(token)) is not None:
                self._outbox.append((job, delta))
            if ended or job.stream.complete:
                self._finish(job, FinishReason.STOP)
            elif len(job.tokens) >= job.prompt.max_tokens:
                self._finish(job, FinishReason.LENGTH)
        except Exception as fault:  # the border to the tokenizer
            self._fail(job, fault)

    def _finish(self, job: Job, reason: FinishReason) -> None:
        if (rest := job.stream.finish()) is not None:
            self._outbox.append((job, rest))
        if job.stream.matched is not None:
            reason = FinishReason.STOP
        now = time.monotonic()
        timing = EngineTiming(job.started - job.arrived, job.first - job.started, now - job.first)
        own = len(job.tokens) - len(job.prompt.begun)
        usage = Usage(len(job.prompt.ids), own, min(job.cached, len(job.prompt.ids)))
        self._drop(job)
        self._ledger.leave("running", "finished")
        self._outbox.append((job, Finish(job.stream.reason(reason), usage, timing, job.matched)))

    def _fail(self, job: Job, fault: Exception) -> None:
        log.error("request %s failed", job.request.request_id, exc_info=fault)
        self._drop(job)
        self._ledger.leave("running", "cancelled" if job.cancelled else "failed")
        self._outbox.append((job, translate(fault, "generate")))

    def _drop(self, job: Job) -> None:
        self._decoder.release(job)
        (self._running if job in self._running else self._reading).remove(job)

    def _end_all(self, error: Callable[[], RotundaError]) -> None:
        while self._line:
            self._ledger.leave("waiting", "failed")
            self._outbox.append((self._line.pop(), error()))
        for job in self._held:
            self._ledger.leave("running", "cancelled" if job.cancelled else "failed")
            self._outbox.append((job, error()))
        self._running.clear()
        self._reading.clear()

    def _post(self) -> None:
        """Hand everything over at once: one call into each event loop, however many jobs have something."""
        letters, self._outbox = self._outbox, []
        for loop in {job.loop for job, _ in letters}:
            mine = [(job.items, item) for job, item in letters if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:
                log.warning("the event loop of %d items is closed", len(mine))


def _deliver(letters: Iterable[tuple[asyncio.Queue[Outgoing], Outgoing]]) -> None:
    for items, item in letters:
        items.put_nowait(item)
