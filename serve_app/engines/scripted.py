"""An engine whose every reply is known beforehand: exact times, exact text, faults on demand.

It keeps the contract of :mod:`serve_app.engines.base` as the real engines do, needs no weights and no torch, and is
what tests *and* benchmarks run: what they measure is the platform.

**Text.** Token ``n`` of the reply is ``"word{n}"`` with a space between; or the words of ``text``, repeated as often
as it takes; or, with ``echo``, the words of the last message. Token ids are 0, 1, 2, …. A token of the prompt is a
word between blanks; images count 16 each. Reasoning between ``<think>`` and ``</think>``, and calls of offered tools
between ``<tool_call>`` and ``</tool_call>``, are told apart from the text as any engine does; a forced call is the
reply itself, a JSON list. Each token has the log-probability -0.5, and its alternatives are ``alternative 1`` and so on
with -1, -2, … No form of the reply is enforced: it is the script's.

**Continuing.** A reply that broke off goes on with the token after those of its ids, or, by text, after as many tokens
as that has words, whoever made them. With ``continues=restart`` it begins anew, as a server that does not know what a
begun reply is, and with ``continues=refuse`` it says that it cannot.

**Pace.** With its slot at ``t0``, token ``n`` is due at ``t0 + ttft + n · pace`` exactly: a late token does not delay
those after it. With ``in_step`` replies begin at the next common step of the engine, as requests that share a forward
pass do, so that the tokens of all replies of one pace fall due together.

Settings, in :attr:`EngineOptions.extra` or as a directive in the last message (which wins)::

    [[tokens=50 ttft=0.1 pace=0.02 echo=true fail_at=10 error=GENERATION_FAILED hang_at=5]]

===========  =========================================================  ========
setting      meaning                                                    default
===========  =========================================================  ========
``tokens``   length of the reply; ``max_tokens`` cuts it (``length``)   16, or the words of ``text``
``ttft``     seconds to the first token                                 0
``pace``     seconds between tokens                                     0
``in_step``  begin at a multiple of ``pace`` on the engine's clock      false
``echo``     reply with the last message, directives left out           false
``continues``  ``text``, ``restart`` or ``refuse``                      text
``fail_at``  fail after so many tokens; without it ``error`` refuses
             the request before it is accepted                          none
``error``    the code of the failure                                    GENERATION_FAILED
``hang_at``  stop for ever after so many tokens                         none
``hold_mb``  mebibytes that the engine holds from now on                as before
``text``     the reply (extra only)                                     none
``load_s``   seconds that loading takes (extra only)                    0
``load_error``  the code with which loading fails (extra only)          none
``directives``  whether messages may hold directives (extra only)       true
===========  =========================================================  ========

An unknown setting, or a value that cannot be read, is refused: :class:`InvalidConfig` for extra,
:class:`InvalidInput` for a directive.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from serve_app.domain.catalog import Capability, ModelInfo
from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import CapabilityMissing, RotundaError, error_from_dict
from serve_app.domain.generation import (
    Accepted,
    EngineTiming,
    Finish,
    FinishReason,
    GenerationRequest,
    Item,
    Message,
    Usage,
)
from serve_app.engines.base import Counters, EngineOptions, Progress, no_progress
from serve_app.engines.context import Fitted, fit
from serve_app.engines.ledger import Ledger, Line, Outcome, Place, check_room, shutting_down
from serve_app.engines.reasoning import FAMILIES
from serve_app.engines.reply import Format, Picked, ReplyStream
from serve_app.engines.script import Script, read_directives, read_extra, reply_length, reply_pieces
from serve_app.engines.text import Detokenizer
from serve_app.engines.tools import HERMES

TOKENS_PER_IMAGE = 16
FORMAT = Format(FAMILIES[0], HERMES)


class Clock(Protocol):
    """Time in seconds, and calls at a time: the two methods of an asyncio loop that the engine uses."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle: ...


def count_tokens(messages: tuple[Message, ...]) -> int:
    return sum(len(message.text.split()) + TOKENS_PER_IMAGE * len(message.images) for message in messages)


class _Run:
    """One request on its way through the engine."""

    def __init__(self, request: GenerationRequest, arrived: float) -> None:
        self.request = request
        self.arrived = arrived
        self.place: Place = "waiting"
        self.outcome: Outcome = "cancelled"  # until something else is known: a closed iterator says nothing
        self.turn: asyncio.Future[None] | None = None


class ScriptedEngine:
    """See the module. ``clock`` is the running loop unless a test gives another."""

    def __init__(self, info: ModelInfo, options: EngineOptions, clock: Clock | None = None) -> None:
        self._info = info
        self._options = options
        self._script = read_extra(options.extra)
        self._given_clock = clock
        self._ledger = Ledger()
        self._line: Line[_Run] = Line()
        self._waits: set[asyncio.Future[None]] = set()
        self._closed = False
        self._held: list[bytes] = []
        """Memory that a script wants in use."""

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def description(self) -> str:
        return f"scripted: ttft {self._script.ttft:g} s, pace {self._script.pace:g} s, known replies"

    def __repr__(self) -> str:
        return f"ScriptedEngine({self._info.id!r}, {self._ledger.snapshot()})"

    def counters(self) -> Counters:
        return self._ledger.snapshot()

    def check_health(self) -> None:
        if self._closed:
            raise shutting_down()

    async def close(self) -> None:
        self._closed = True
        for wait in list(self._waits):
            if not wait.done():
                wait.set_exception(shutting_down())
        await asyncio.sleep(0)  # let those who waited end before the caller goes on

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Item]:
        """See :class:`serve_app.engines.base.Engine`."""
        run = _Run(request, self._clock.time())
        self._ledger.enter()
        try:
            self.check_health()
            script = read_directives(self._script, request.messages[-1])
            run.request = request = self._resumed(script, request)
            self._check(script, request)
            if script.hold_mb is not None:
                self._hold(script.hold_mb)
            fitted = self._fit(request)
            yield Accepted(count_tokens(fitted.prompt), fitted.dropped, self._info.revision or None)
            await self._take_slot(run)
            async with aclosing(self._reply(run, script, fitted)) as items:
                async for item in items:
                    yield item
        except RotundaError:
            run.outcome = "failed"
            raise
        finally:
            self._leave(run)

    @property
    def _clock(self) -> Clock:
        return self._given_clock or asyncio.get_running_loop()

    def _resumed(self, script: Script, request: GenerationRequest) -> GenerationRequest:
        if request.continuation is None:
            return request
        if script.continues == "refuse":
            raise CapabilityMissing("This model cannot continue a reply.")
        return replace(request, continuation=request.continuation.read_by(self._info.revision))

    def _hold(self, mebibytes: int) -> None:
        """Allocate what is lacking, so that memory in use only grows on the way to more."""
        held = sum(map(len, self._held)) // 2**20
        if mebibytes < held:
            self._held.clear()
            held = 0
        self._held.append(b"\1" * ((mebibytes - held) * 2**20))

    def _check(self, script: Script, request: GenerationRequest) -> None:
        if request.has_images and Capability.VISION not in self._info.capabilities:
            raise CapabilityMissing("This model reads text only. Choose one with the capability vision.")
        if request.has_tools and Capability.TOOLS not in self._info.capabilities:
            raise CapabilityMissing("This model knows no tools. Choose one with the capability tools.")
        if script.error is not None and script.fail_at is None:
            raise script.failure()
        check_room(self._ledger.snapshot(), self._options)

    def _fit(self, request: GenerationRequest) -> Fitted[tuple[Message, ...]]:
        limits = [limit for limit in (self._info.context_length, self._options.context_length) if limit]
        return fit(
            request.messages,
            render=lambda messages: messages,
            length=count_tokens,
            limit=min(limits, default=None),
            max_tokens=request.options.max_tokens or self._options.max_tokens,
            policy=request.context_policy,
        )

    async def _take_slot(self, run: _Run) -> None:
        if self._ledger.snapshot().running < self._options.max_concurrency and not len(self._line):
            self._start(run)
            return
        run.turn = asyncio.get_running_loop().create_future()
        self._line.push(run, run.request.priority, run.arrived)
        await self._wait(run.turn)

    def _start(self, run: _Run) -> None:
        run.place = "running"
        self._ledger.start()

    def _leave(self, run: _Run) -> None:
        self._line.remove(run)
        self._ledger.leave(run.place, run.outcome)
        while len(self._line) and self._ledger.snapshot().running < self._options.max_concurrency:
            following = self._line.pop()
            if following.turn is not None and not following.turn.done():
                self._start(following)
                following.turn.set_result(None)

    async def _reply(self, run: _Run, script: Script, fitted: Fitted[tuple[Message, ...]]) -> AsyncGenerator[Item]:
        prompt_tokens = count_tokens(fitted.prompt)
        self._ledger.count(prompt_tokens=prompt_tokens)
        message = run.request.messages[-1]
        piece, total = reply_pieces(script, message), reply_length(script, message)
        stream, first, spent = _stream(run.request, piece), 0, 0
        if (before := run.request.continuation) is not None:
            first, spent = (0 if script.continues == "restart" else _next_token(before)), before.spent
            stream.replay(before.token_ids)
        limit = first + max(0, fitted.max_tokens - spent)
        begun, done = self._clock.time(), first
        run.request.marks.started = begun
        due = math.ceil(begun / script.pace) * script.pace if script.in_step and script.pace else begun
        due += script.ttft
        while done < min(total, limit) and not stream.complete:
            await self._due(script, done, due + (done - first) * script.pace)
            if run.request.options.logprobs is not None:
                stream.picked.append(_pick(done, run.request.options.logprobs))
            delta = stream.push(done)
            done += 1
            run.request.marks.first = run.request.marks.first or self._clock.time()
            self._ledger.count(completion_tokens=1)
            if delta is not None:
                yield delta
        await self._due(script, done, None)
        if (rest := stream.finish()) is not None:
            yield rest
        run.outcome = "finished"
        cut = not stream.complete and total > limit
        reason = stream.reason(FinishReason.LENGTH if cut else FinishReason.STOP)
        yield Finish(reason, Usage(prompt_tokens, done - first), self._timing(run, script, begun), stream.matched)

    async def _due(self, script: Script, done: int, due: float | None) -> None:
        """Wait until token ``done`` is due, or do what the script has for this place; without ``due`` only that."""
        if script.fail_at is not None and done >= script.fail_at:
            raise script.failure()
        if script.hang_at is not None and done >= script.hang_at:
            await self._wait(asyncio.get_running_loop().create_future())
        if due is None:
            return
        if due <= self._clock.time():
            self.check_health()
            await asyncio.sleep(0)  # overdue, but others get their turn, and a cancellation is heard
            return
        wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self._clock.call_at(due, _release, wait)
        try:
            await self._wait(wait)
        finally:
            timer.cancel()

    async def _wait(self, wait: asyncio.Future[None]) -> None:
        """Wait for ``wait``, or until the engine closes."""
        self.check_health()
        self._waits.add(wait)
        try:
            await wait
        finally:
            self._waits.discard(wait)

    def _timing(self, run: _Run, script: Script, begun: float) -> EngineTiming:
        spent = self._clock.time() - begun
        prefill = min(spent, script.ttft)
        return EngineTiming(queue_s=begun - run.arrived, prefill_s=prefill, decode_s=spent - prefill)


def _next_token(before: Continuation) -> int:
    """The number of the token that follows."""
    return before.token_ids[-1] + 1 if before.token_ids else len(before.text.split())


def _pick(token: int, most: int) -> Picked:
    """A token with made-up log-probabilities; see the module. Its alternatives have negative numbers."""
    return Picked(token, -0.5, tuple((-rank, -float(rank)) for rank in range(1, most + 1)))


def _stream(request: GenerationRequest, piece: Callable[[int], str]) -> ReplyStream:
    def spell(token: int) -> bytes:
        return (piece(token) if token >= 0 else f"alternative {-token}").encode()

    detokenizer = Detokenizer(piece, lambda ids: "".join(map(piece, ids)))
    return FORMAT.stream(request, detokenizer, request.options.stop, spell=spell)


def _release(wait: asyncio.Future[None]) -> None:
    if not wait.done():
        wait.set_result(None)


def describe(model_id: str) -> ModelInfo:
    """A model of this engine, which needs no files: it chats, completes, and takes images."""
    able = frozenset({Capability.CHAT, Capability.COMPLETION, Capability.VISION, Capability.TOOLS})
    return ModelInfo(
        model_id, "", architecture="scripted", capabilities=able, context_length=1_000_000, revision=model_id
    )


def create(info: ModelInfo, options: EngineOptions, on_progress: Progress = no_progress) -> ScriptedEngine:
    """Load as the script says; blocks for ``load_s``.

    Raises:
        InvalidConfig: a setting is wrong.
        RotundaError: the one that ``load_error`` names.
    """
    script = read_extra(options.extra)
    on_progress("weights", 0.0)
    time.sleep(script.load_s)
    if script.load_error is not None:
        raise error_from_dict({"code": script.load_error, "message": "The script asked for this failure."})
    on_progress("weights", 1.0)
    return ScriptedEngine(info, options)
