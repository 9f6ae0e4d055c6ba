"""The way of one request: admit → route → stream → record.

The gateway knows neither Ray nor HTTP. A router says which models may answer, a backend (:mod:`backend`) makes
one of them answer, and the surfaces turn what comes out into their own protocols.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.backend import Backend, Router
from serve_app.domain.backoff import Backoff
from serve_app.domain.breaker import Breakers, Circuit
from serve_app.domain.catalog import Entry
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import (
    DeadlineExceeded,
    Phase,
    ProviderError,
    QueueFull,
    ReplicaRetired,
    RotundaError,
)
from serve_app.domain.events import Loading, Queued, Switched
from serve_app.domain.generation import Accepted, Delta, Finish, GenerationRequest, Item, Timing
from serve_app.domain.routing import Admission, Ask, Candidate, Granted, Lease, Waiting
from serve_app.domain.transcript import Part, Transcript, detour, final, worse
from serve_app.fullness import Fullness
from serve_app.leases import Leases, RouterAway
from serve_app.telemetry.recording import Record
from serve_app.telemetry.tracing import Trail, unquoted
from serve_app.watchdog import Watchdog, watching

logger = logging.getLogger(__name__)

RETIRED_S = 0.1
"""Pause after a replica said that it is leaving: the router may not have heard of it yet."""
MOST_RETIREMENTS = 20
"""So often a request may meet a model that is leaving; more of that is a fault."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The five timeouts of a reply, in seconds, and how often to try again before the first byte."""

    load_s: float = 120.0
    first_token_s: float = 60.0
    idle_s: float = 60.0
    total_s: float = 300.0
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(frozen=True, slots=True)
class Routed:
    """A model was chosen and is about to be called; what follows is attempt number ``attempt`` (from 1) of the reply,
    which goes on with what was told before."""

    candidate: Candidate
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Completed:
    """The reply is whole; always the last step. ``parts``: which attempts made it."""

    finish: Finish
    timing: Timing
    parts: tuple[Part, ...] = ()


Step = Queued | Loading | Switched | Routed | Accepted | Delta | Completed


class Gateway:
    """Sends requests to models. One per ingress; holds the leases that spare a call to the router.

    Args:
        router: decides who may answer.
        backend: calls the models.
        limits: timeouts and retries.
        clock: monotonic seconds.
        breakers: which models and providers failed lately, as this gateway saw it.
        holder: the name of this gateway, unique among all of them. Its :attr:`leases` must be kept
            (:meth:`Leases.keep`) where there is a real router.
    """

    def __init__(
        self,
        router: Router,
        backend: Backend,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        breakers: Breakers | None = None,
        holder: str = "gateway",
    ) -> None:
        self.router = router
        self.leases = Leases(router, holder, clock)
        self._breakers = breakers or Breakers()
        self._backend = backend
        self._limits = limits or Limits()
        self._clock = clock
        self._grants: dict[tuple[Any, ...], tuple[int, Granted]] = {}
        """What was granted for which question, and of which catalogue; good as long as there is a lease on it."""
        self._fullness = Fullness(clock, self.leases.running)

    async def admit(self, ask: Ask, trail: Trail | None = None) -> Admission:
        """The router's answer; without a call when there is a live lease. Raises what makes the request impossible,
        and what the only model for it would answer for want of room."""
        with (trail or Trail.quiet()).phase("gateway.admit"):
            admission = await self._admit(ask)
            if isinstance(admission, Granted) and len(admission.route.candidates) == 1:
                self._fullness.check(admission.route.first.entry.full_name)  # nothing is stored yet
            return admission

    async def _admit(self, ask: Ask) -> Admission:
        key = (ask.model, ask.needs, ask.fallbacks)
        catalogue, granted = self._grants.get(key, (-1, None))
        current = granted is not None and catalogue == self.leases.catalogue
        if granted is not None and current and granted.route.takes(ask.least_tokens):
            lease = self.leases.use(granted.lease.model)
            if lease is not None:
                return replace(granted, lease=lease)
        self._grants.pop(key, None)
        admission = await self.leases.ask(ask)
        if isinstance(admission, Granted) and not (admission.route.passed_over or admission.route.momentary):
            self._grants[key] = (self.leases.catalogue, admission)
        return admission

    async def forget(self, ask: Ask, admission: Admission) -> None:
        """Give up a request that was admitted and will not be made; one that waits leaves the queue."""
        if isinstance(admission, Waiting):
            self.leases.leave(ask.ticket)
            with suppress(RotundaError):  # a router that does not answer forgets those who no longer ask by itself
                await self.router.cancel(ask.ticket)

    async def reply(
        self, ask: Ask, request: GenerationRequest, admission: Admission | None = None, trail: Trail | None = None
    ) -> AsyncGenerator[Step, None]:
        """Generate one reply; close the iterator to stop it.

        Args:
            ask: what the router is asked.
            request: what the model is asked; its ``model`` is replaced by the chosen one.
            admission: the router's first answer, when the caller has it already.
            trail: of the request that wants the reply.

        Raises:
            RotundaError: no model could answer, or go on with the answer that another one had begun.
        """
        if request.seed is None:
            request = replace(request, draw_seed=secrets.randbits(63))
        granted: Granted | None = None
        with Record(trail or Trail.quiet(), request, self._clock) as record:
            admission = admission or await self.admit(ask, trail)
            with record.waiting():
                async with aclosing(self._wait(ask, admission, record)) as news:
                    async for item in news:
                        if isinstance(item, Granted):
                            granted = item
                        else:
                            record.heard(item)
                            yield item
            assert granted is not None
            async with aclosing(self._route(ask, granted, request, record)) as steps:
                async for step in steps:
                    yield step

    async def embed(self, ask: Ask, request: EmbeddingRequest, trail: Trail | None = None) -> Embeddings:
        """One vector for each text, from the model that was asked for: those of another would mean something else.

        Raises:
            RotundaError: it cannot, also after the tries that the backoff allows.
        """
        ask, failures, left = replace(ask, fallbacks=(), alone=True), 0, 0
        with Record(trail or Trail.quiet(), request, self._clock) as record:
            candidate = await self._embedder(ask, record)
            record.chosen((candidate,))
            while True:
                try:
                    with record.attempt(candidate):
                        return record.embedded(await self._embedded(candidate.entry, request, record))
                except RotundaError as error:
                    self.leases.drop(candidate.entry.full_name)
                    left += isinstance(error, ReplicaRetired)
                    failures += not isinstance(error, ReplicaRetired) or left > MOST_RETIREMENTS
                    delay = self._delay_s(error, failures)
                    if delay is None:
                        raise
                with record.backing_off():
                    await asyncio.sleep(delay)
                candidate = await self._embedder(ask, record)

    async def _embedder(self, ask: Ask, record: Record) -> Candidate:
        """The model that may be called now."""
        admission = await self.admit(ask, record.below)
        with record.waiting():
            async with aclosing(self._wait(ask, admission, record)) as news:
                async for item in news:
                    if isinstance(item, Granted):
                        return item.route.first
                    record.heard(item)
        raise AssertionError("a wait ends with a grant, or raises")

    async def _embedded(self, entry: Entry, request: EmbeddingRequest, record: Record) -> Embeddings:
        request = replace(request, model=entry.id, trace=record.carrier)
        try:
            async with asyncio.timeout(self._limits.total_s), self.leases.calling(entry.full_name):
                return await self._backend.embed(entry, request, self._lease_on(entry).epoch)
        except TimeoutError:
            raise DeadlineExceeded.during("total", self._limits.total_s, entry.provider) from None

    async def _wait(
        self, ask: Ask, admission: Admission | None, record: Record | None = None
    ) -> AsyncGenerator[Queued | Loading | Granted, None]:
        """Admit: yield what the client may know while it waits, and at last the grant."""
        current = admission or await self.admit(ask)
        told: Queued | Loading | None = None
        loading_since: float | None = None
        try:
            while isinstance(current, Waiting):
                news = current.news
                if isinstance(news, Loading):
                    loading_since = loading_since or self._clock()
                if news != told:
                    yield news
                    told = news
                await self.leases.news(ask.ticket, current.retry_in_s)
                current = await self.admit(ask)
        except (asyncio.CancelledError, GeneratorExit):
            await self.forget(ask, current)
            raise
        if loading_since is not None and record is not None:
            record.loaded(self._clock() - loading_since)
        yield current

    async def _secure(self, ask: Ask, candidate: Candidate, record: Record) -> AsyncGenerator[Queued | Loading, None]:
        """See to it that there is a lease on a candidate, which may take until it is loaded."""
        if self.leases.live(candidate.entry.full_name) is not None:
            return
        ticket = f"{ask.ticket}-{secrets.token_hex(4)}"
        again = replace(ask, ticket=ticket, model=candidate.entry.full_name, fallbacks=(), alone=True)
        with record.securing():
            async with aclosing(self._wait(again, None, record)) as news:
                async for item in news:
                    if not isinstance(item, Granted):
                        record.heard(item)
                        yield item

    def _lease_on(self, entry: Entry) -> Lease:
        """The lease under which a model is called now. Nothing may come between this and the call.

        Raises:
            ReplicaRetired: it has been revoked meanwhile.
        """
        lease = self.leases.live(entry.full_name)
        if lease is None:
            raise ReplicaRetired(f"The lease on {entry.id} has ended.")
        return lease

    async def _route(
        self, ask: Ask, granted: Granted, request: GenerationRequest, record: Record
    ) -> AsyncGenerator[Step, None]:
        """Route: the healthy candidates in order, each as often as the backoff allows.

        What the client was told stays: after the first byte, the same model goes on with it, or else a model that can.
        """
        with record.deciding():
            candidates = self._breakers.order(granted.route.candidates, self._clock())
        record.chosen(candidates)
        transcript, failure = Transcript(request), None
        switch = detour(granted.route, candidates[0])
        for rank, candidate in enumerate(candidates):
            failures = left = 0
            while True:
                news: list[Step] = [step for step in (switch, Routed(candidate, len(transcript.parts) + 1)) if step]
                begun = self._clock()
                self._breakers.tried(candidate.entry, begun)
                try:
                    async with aclosing(self._attempt(news, ask, candidate, transcript, record)) as steps:
                        async for step in steps:
                            yield step
                    self._breakers.succeeded(candidate.entry)
                    self._fullness.left(candidate.entry.full_name)
                    return
                except RotundaError as error:
                    left += isinstance(error, ReplicaRetired)
                    failures += not isinstance(error, ReplicaRetired) or left > MOST_RETIREMENTS
                    spoke = transcript.parts and transcript.parts[-1].tokens > 0
                    delay = self._failed(candidate, error, failures, begun if spoke else None)
                    failure = worse(failure, error)
                    if (delay is None and rank + 1 == len(candidates)) or final(failure, transcript):
                        raise failure from None
                except (asyncio.CancelledError, GeneratorExit):
                    self._breakers.released(candidate.entry)
                    self._fullness.left(candidate.entry.full_name)
                    raise
                logger.warning("attempt %d on %s failed: %s", len(transcript.parts), candidate.name, unquoted(failure))
                switch = switch if news else None  # what is left there was not told
                if delay is None:
                    source = switch.source if switch else candidate.name
                    switch = Switched(source, candidates[rank + 1].name, failure.message)
                    break
                with record.backing_off():
                    await asyncio.sleep(delay)

    async def _attempt(
        self, news: list[Step], ask: Ask, candidate: Candidate, transcript: Transcript, record: Record
    ) -> AsyncGenerator[Step, None]:
        """One candidate's steps, after the news about it. They are told at once, or, when it is to go on with a reply,
        once it does; what was not told stays in ``news``."""
        while news and not transcript.begun:
            yield news.pop(0)
        async with aclosing(self._secure(ask, candidate, record)) as waits:
            async for wait in waits:
                yield wait
        with record.attempt(candidate):
            async with aclosing(self._stream(candidate, transcript, record)) as steps:
                async for step in steps:
                    if news and isinstance(step, Accepted):  # no word of the model yet, as a load is none
                        news.append(step)
                        continue
                    while news and not isinstance(step, Loading):
                        yield news.pop(0)
                    yield step

    def _failed(self, candidate: Candidate, error: RotundaError, failures: int, since: float | None) -> float | None:
        """Record a failed attempt; the seconds until the next one on the same candidate, None for no more."""
        error.provider = error.provider or candidate.entry.provider
        now, name = self._clock(), candidate.entry.full_name
        if isinstance(error, QueueFull):
            self._fullness.refused(name, error)
        else:
            self.leases.drop(name)
            self._fullness.left(name)
        # The tries of one request are one failure, and a router that is away is nobody's.
        if failures == 1 and not isinstance(error, RouterAway):
            self._breakers.failed(candidate.entry, error, now, since)
        else:
            self._breakers.released(candidate.entry)
        if self._breakers.state(candidate.entry, now) is Circuit.OPEN:
            return None
        return self._delay_s(error, failures)

    def _delay_s(self, error: RotundaError, failures: int) -> float | None:
        """Seconds until the next try. A model that has left meanwhile is no failure: the router is asked anew."""
        if isinstance(error, ReplicaRetired) and not failures:
            return RETIRED_S
        return self._limits.backoff.delay_s(failures, random.random) if error.worth_repeating else None

    async def _stream(self, candidate: Candidate, transcript: Transcript, record: Record) -> AsyncGenerator[Step, None]:
        """Stream one candidate's items, each within its time, and record when they came."""
        self._fullness.check(candidate.entry.full_name)
        request = transcript.attempt(candidate.entry)
        if not candidate.resident:
            yield Loading(candidate.name)
        request = replace(request, trace=record.carrier)
        stream = self._backend.stream(candidate.entry, request, self._lease_on(candidate.entry).epoch)
        async with aclosing(stream) as items, watching() as dog, self.leases.calling(candidate.entry.full_name):
            phase: Phase = "load"
            while True:
                item = await self._next(items, dog, phase, record, candidate.entry.provider)
                match item:
                    case Accepted():
                        record.accepted(item)
                        phase = "first token"
                    case Delta():
                        record.said(item)
                        phase = "idle"
                for told in transcript.heard(item):
                    if isinstance(told, Finish):
                        yield Completed(told, record.finished(told), tuple(transcript.parts))
                        return
                    yield told

    async def _next(
        self, items: AsyncIterator[Item], dog: Watchdog, phase: Phase, record: Record, provider: str
    ) -> Item:
        limit = {"load": self._limits.load_s, "first token": self._limits.first_token_s}.get(phase, self._limits.idle_s)
        left = (record.admitted or record.started) + self._limits.total_s - self._clock()
        try:
            return await dog.wait(anext(items), min(limit, left))
        except TimeoutError:
            if left <= limit:
                raise DeadlineExceeded.during("total", self._limits.total_s, provider) from None
            raise DeadlineExceeded.during(phase, limit, provider) from None
        except StopAsyncIteration:
            raise ProviderError("The model's answer broke off without an end. Try again.", provider, True) from None
