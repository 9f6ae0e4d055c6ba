"""The way of one request: admit → route → stream → record.

The gateway knows neither Ray nor HTTP. A :class:`Router` says which models may answer, a :class:`Backend` makes
one of them answer, and the surfaces turn what comes out into their own protocols.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from serve_app.domain.backoff import Backoff
from serve_app.domain.breaker import Breakers, Circuit
from serve_app.domain.catalog import Entry
from serve_app.domain.embeddings import Embeddings
from serve_app.domain.errors import DeadlineExceeded, InvalidInput, Phase, ProviderError, ReplicaRetired, RotundaError
from serve_app.domain.events import Loading, Queued, Switched
from serve_app.domain.fleet import FleetView
from serve_app.domain.generation import Accepted, Delta, Finish, GenerationRequest, Item, Timing
from serve_app.domain.rotation_view import HISTORY, RotationView
from serve_app.domain.routing import Admission, Ask, Candidate, Granted, Route, Waiting
from serve_app.telemetry.recording import Record
from serve_app.telemetry.tracing import Trail
from serve_app.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Router(Protocol):
    """Decides; holds the fleet's state."""

    async def admit(self, ask: Ask) -> Admission: ...

    async def cancel(self, ticket: str) -> None:
        """Forget a ticket that was answered with :class:`Waiting`."""
        ...

    async def view(self) -> FleetView: ...

    async def rotation(self, history: int = HISTORY) -> RotationView:
        """What holds memory, who waits, and the last ``history`` decisions."""
        ...

    async def command(self, action: str, model: str = "", **arguments: Any) -> dict[str, Any]:
        """Act for an operator; the answer is JSON values.

        * ``load``, ``unload``, ``pin`` (``pinned``: bool) a model: ``{model, state, reason}`` as it is right after.
        * ``plan`` a model without acting: the fields of ``Plan.to_json`` (``verdict`` is resident, loading, fits,
          evicts, waits, never_fits or refused) and ``bytes``, what it needs part by part.
        * ``set_rotation`` (``add``, ``remove``: lists of names): which models may be used at all; ``{removed}``.
        * ``emergency_cleanup``: every idle unpinned model leaves now; ``{evicting}``.

        Raises:
            ModelNotFound, ModelAmbiguous: as ever.
            InvalidInput: no such action, or it contradicts a pin.
        """
        ...


class Backend(Protocol):
    """Makes one model answer."""

    def stream(self, entry: Entry, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]: ...

    async def embed(self, entry: Entry, texts: Sequence[str], epoch: int) -> Embeddings: ...


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
    """A model was chosen and is about to be called."""

    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Completed:
    """The reply is whole; always the last step."""

    finish: Finish
    timing: Timing


Step = Queued | Loading | Switched | Routed | Accepted | Delta | Completed


class Gateway:
    """Sends requests to models. One per ingress; holds the leases that spare a call to the router.

    Args:
        router: decides who may answer.
        backend: calls the models.
        limits: timeouts and retries.
        clock: monotonic seconds.
        breakers: which models and providers failed lately, as this gateway saw it.
    """

    def __init__(
        self,
        router: Router,
        backend: Backend,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        breakers: Breakers | None = None,
    ) -> None:
        self.router = router
        self._breakers = breakers or Breakers()
        self._backend = backend
        self._limits = limits or Limits()
        self._clock = clock
        self._leases: dict[tuple[Any, ...], tuple[float, Granted]] = {}

    async def admit(self, ask: Ask, trail: Trail | None = None) -> Admission:
        """The router's answer, or a live lease's. Raises whatever makes the request impossible."""
        with (trail or Trail.quiet()).phase("gateway.admit"):
            return await self._admit(ask)

    async def _admit(self, ask: Ask) -> Admission:
        key = (ask.model, ask.needs, ask.fallbacks)
        now = self._clock()
        expires, granted = self._leases.get(key, (0.0, None))
        if granted is not None and now < expires:
            return granted
        self._leases.pop(key, None)
        admission = await self.router.admit(ask)
        if isinstance(admission, Granted) and admission.route.first.resident:
            self._leases[key] = (now + admission.lease.ttl_s, admission)
        return admission

    async def forget(self, ask: Ask, admission: Admission) -> None:
        """Give up a request that was admitted and will not be made; one that waits leaves the queue."""
        if isinstance(admission, Waiting):
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
            RotundaError: no model could answer. Before the first byte the other candidates were tried.
        """
        granted: Granted | None = None
        with Record(trail or Trail.quiet(), request, self._clock) as record:
            admission = admission or await self.admit(ask, trail)
            with record.waiting():
                async with aclosing(self._wait(ask, admission)) as news:
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

    async def embed(self, ask: Ask, texts: Sequence[str]) -> Embeddings:
        """One vector for each text, from the model that was asked for: those of another would mean something else.

        Raises:
            RotundaError: it cannot, also after the tries that the backoff allows.
        """
        granted: Granted | None = None
        async with aclosing(self._wait(ask, None)) as news:
            async for item in news:
                granted = item if isinstance(item, Granted) else granted
        assert granted is not None
        entry, failures = granted.route.first.entry, 0
        while True:
            try:
                async with asyncio.timeout(self._limits.total_s):
                    return await self._backend.embed(entry, texts, granted.lease.epoch)
            except TimeoutError:
                raise DeadlineExceeded.during("total", self._limits.total_s, entry.provider) from None
            except RotundaError as error:
                self._leases.clear()
                failures += 1
                delay = self._limits.backoff.delay_s(failures, random.random) if error.retryable else None
                if delay is None:
                    raise
                failure = error
            await asyncio.sleep(delay)
            granted = await self._again(ask, granted, failure)

    async def _wait(self, ask: Ask, admission: Admission | None) -> AsyncGenerator[Queued | Loading | Granted, None]:
        """Admit: yield what the client may know while it waits, and at last the grant."""
        current = admission or await self.admit(ask)
        told: Queued | Loading | None = None
        try:
            while isinstance(current, Waiting):
                news = Queued(current.position, current.reason, current.eta_ms)
                if news != told:
                    yield news
                    told = news
                await asyncio.sleep(current.retry_in_s)
                current = await self.admit(ask)
        except (asyncio.CancelledError, GeneratorExit):
            await self.forget(ask, current)
            raise
        yield current

    async def _route(
        self, ask: Ask, granted: Granted, request: GenerationRequest, record: Record
    ) -> AsyncGenerator[Step, None]:
        """Route: the healthy candidates in order, each as often as the backoff allows, until one has said something."""
        with record.trail.phase("route.decide"):
            candidates = self._breakers.order(granted.route.candidates, self._clock())
        record.chosen(candidates)
        detour = _detour(granted.route, candidates[0])
        if detour is not None:
            yield detour
        for rank, candidate in enumerate(candidates):
            failures = 0
            while True:
                yield Routed(candidate)
                self._breakers.tried(candidate.entry, self._clock())
                try:
                    with record.attempt(candidate):
                        async with aclosing(self._stream(candidate, granted, request, record)) as steps:
                            async for step in steps:
                                yield step
                    self._breakers.succeeded(candidate.entry)
                    return
                except RotundaError as error:
                    failures += 1
                    delay = self._failed(candidate, error, failures)
                    last = delay is None and rank + 1 == len(candidates)
                    if record.first is not None or isinstance(error, InvalidInput) or last:
                        raise
                    failure = error
                except (asyncio.CancelledError, GeneratorExit):
                    self._breakers.released(candidate.entry)
                    raise
                logger.warning("attempt %d on %s failed: %s", failures, candidate.name, failure)
                if delay is None:
                    yield Switched(candidate.name, candidates[rank + 1].name, failure.message)
                    break
                with record.backing_off():
                    await asyncio.sleep(delay)
                    granted = await self._again(ask, granted, failure)

    def _failed(self, candidate: Candidate, error: RotundaError, failures: int) -> float | None:
        """Record a failed attempt; the seconds until the next one on the same candidate, None for no more."""
        self._leases.clear()
        error.provider = error.provider or candidate.entry.provider
        now = self._clock()
        self._breakers.failed(candidate.entry, error, now)
        if not error.retryable or self._breakers.state(candidate.entry, now) is Circuit.OPEN:
            return None
        return self._limits.backoff.delay_s(failures, random.random)

    async def _again(self, ask: Ask, granted: Granted, failure: RotundaError) -> Granted:
        """A retired replica's lease is void: ask the router for a new one."""
        if not isinstance(failure, ReplicaRetired):
            return granted
        admission = await self.admit(ask)
        return admission if isinstance(admission, Granted) else granted

    async def _stream(
        self, candidate: Candidate, granted: Granted, request: GenerationRequest, record: Record
    ) -> AsyncGenerator[Step, None]:
        """Stream one candidate's items, each within its time, and record when they came."""
        if not candidate.resident:
            yield Loading(candidate.name)
        request = replace(request, model=candidate.entry.id, trace=record.carrier)
        stream = self._backend.stream(candidate.entry, request, granted.lease.epoch)
        async with aclosing(stream) as items, _watchdog() as dog:
            phase: Phase = "load"
            while True:
                item = await self._next(items, dog, phase, record, candidate.entry.provider)
                match item:
                    case Accepted():
                        record.accepted(item)
                        phase = "first token"
                        yield item
                    case Delta():
                        record.said(item)
                        phase = "idle"
                        yield item
                    case Finish():
                        yield Completed(item, record.finished(item))
                        return

    async def _next(
        self, items: AsyncIterator[Item], dog: Watchdog, phase: Phase, record: Record, provider: str
    ) -> Item:
        limit = {"load": self._limits.load_s, "first token": self._limits.first_token_s}.get(phase, self._limits.idle_s)
        left = record.started + self._limits.total_s - self._clock()
        try:
            return await dog.wait(anext(items), min(limit, left))
        except TimeoutError:
            if left <= limit:
                raise DeadlineExceeded.during("total", self._limits.total_s, provider) from None
            raise DeadlineExceeded.during(phase, limit, provider) from None
        except StopAsyncIteration:
            raise ProviderError("The model's answer broke off without an end. Try again.", provider, True) from None


def _detour(route: Route, first: Candidate) -> Switched | None:
    """What the client is told when another model than the one it asked for is tried first."""
    if first is not route.first:
        return Switched(route.first.name, first.name, f"{route.first.name} failed several times in a row")
    return Switched(route.passed_over[0][0], first.name, route.passed_over[0][1]) if route.passed_over else None


@asynccontextmanager
async def _watchdog() -> AsyncGenerator[Watchdog, None]:
    dog = Watchdog()
    try:
        yield dog
    finally:
        dog.close()
