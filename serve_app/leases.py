"""The leases that a gateway holds: what spares most requests a call to the router, and what it must give back.

A lease is the right to call one model for two seconds. It is renewed while it is used, by one call for all models of
this gateway, which the router keeps open for half a second: what it wants revoked arrives at once. Once this gateway
has said that it stopped, it makes no call under that lease any more, whatever still arrives.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from serve_app.domain.errors import ProviderUnavailable, RotundaError
from serve_app.domain.leasing import Orders, Report
from serve_app.domain.routing import Admission, Ask, Lease, Waiting

logger = logging.getLogger(__name__)

RENEW_AT = 0.6
"""A lease that is used is renewed once so much of its life is left."""
AGAIN_S = 0.2
"""Pause before a router that did not answer is asked again."""


class RouterAway(ProviderUnavailable):
    """The router itself did not answer; whatever it was asked may be asked again."""


class Granter(Protocol):
    """The part of the router that gives leases."""

    async def admit(self, ask: Ask) -> Admission: ...

    async def sync(self, report: Report) -> Orders: ...


@dataclass(slots=True)
class _Held:
    lease: Lease
    expires: float
    uses: int = 0


@dataclass(slots=True)
class _Waiting:
    since: float
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Leases:
    """One per gateway.

    Args:
        router: gives them.
        holder: this gateway, unique among all of them.
        clock: monotonic seconds.
        patience_s: how long a router that does not answer is asked again.
    """

    def __init__(self, router: Granter, holder: str, clock: Callable[[], float], patience_s: float = 60.0) -> None:
        self._router = router
        self._holder = holder
        self._clock = clock
        self._patience_s = patience_s
        self._held: dict[str, _Held] = {}
        self._tickets: dict[str, _Waiting] = {}
        self._running: Counter[str] = Counter()
        self._stopped: dict[str, int] = {}
        """The newest epoch of each model that this gateway has given up; leases up to it count no more."""
        self._unsaid: set[str] = set()
        """Models of which the router has not heard yet that they were given up."""
        self._busy = asyncio.Event()
        """Set while there is anything to talk about with the router."""
        self.catalogue = 0

    def __repr__(self) -> str:
        return f"Leases({self._holder}: {', '.join(sorted(self._held))}; waiting: {', '.join(self._tickets)})"

    async def ask(self, ask: Ask) -> Admission:
        """The router's answer to a request; a router that is away is asked again with the request's true age."""
        asked_at = self._clock()
        while True:
            now = self._clock()
            waiting = self._tickets.get(ask.ticket)
            since = waiting.since if waiting else asked_at
            try:
                admission = await self._router.admit(replace(ask, holder=self._holder, waited_s=now - since))
            except RouterAway:
                if self._clock() - asked_at > self._patience_s:
                    self.leave(ask.ticket)
                    raise
                await asyncio.sleep(AGAIN_S)
                continue
            except BaseException:
                self.leave(ask.ticket)
                raise
            break
        if isinstance(admission, Waiting):
            self._tickets.setdefault(ask.ticket, _Waiting(asked_at))
        else:
            self.leave(ask.ticket)
            self._take(admission.lease, now)
        self._busy.set()
        return admission

    def leave(self, ticket: str) -> None:
        """The request waits no more."""
        self._tickets.pop(ticket, None)

    async def news(self, ticket: str, timeout_s: float) -> None:
        """Return when there is news of a waiting request, or after ``timeout_s``."""
        waiting = self._tickets.get(ticket)
        if waiting is None:
            await asyncio.sleep(timeout_s)
            return
        try:
            async with asyncio.timeout(timeout_s):
                await waiting.news.wait()
        except TimeoutError:
            return
        waiting.news.clear()

    def live(self, model: str) -> Lease | None:
        """The lease on a model under which it may be called right now."""
        held = self._held.get(model)
        return held.lease if held is not None and self._clock() < held.expires else None

    def use(self, model: str) -> Lease | None:
        """The same, for one more request."""
        lease = self.live(model)
        if lease is not None:
            self._held[model].uses += 1
        return lease

    def drop(self, model: str) -> None:
        """Do not call under the present lease any more: the replica said, or showed, that it is not there."""
        self._held.pop(model, None)

    @asynccontextmanager
    async def calling(self, model: str) -> AsyncIterator[None]:
        """Counts a call while it runs."""
        self._running[model] += 1
        try:
            yield
        finally:
            self._running[model] -= 1
            if not self._running[model]:
                del self._running[model]

    def running(self, model: str) -> int:
        """How many calls of this gateway run."""
        return self._running[model]

    async def keep(self) -> None:
        """Talk with the router for as long as this gateway lives; cancel it to end."""
        while True:
            if not (self._held or self._tickets or self._unsaid):
                self._busy.clear()
                await self._busy.wait()
            try:
                await self._talk()
            except RotundaError as error:
                logger.debug("the router does not answer: %s", error)
                await asyncio.sleep(AGAIN_S)

    async def _talk(self) -> None:
        now = self._clock()
        self._held = {model: held for model, held in self._held.items() if now < held.expires}
        said = {model: self._stopped[model] for model in self._unsaid}
        used = {model: held.uses for model, held in self._held.items() if held.uses and self._ripe(held, now)}
        tickets = tuple(ticket for ticket, waiting in self._tickets.items() if not waiting.news.is_set())
        report = Report(self._holder, used, said, {model: self._running[model] for model in said}, tickets)
        orders = await self._router.sync(report)
        for model, uses in used.items():
            if model in self._held:
                self._held[model].uses -= uses
        self._unsaid -= {model for model, epoch in said.items() if self._stopped[model] == epoch}
        self._obey(orders, now)

    def _obey(self, orders: Orders, asked_at: float) -> None:
        self.catalogue = orders.catalogue
        for model, epoch in orders.revoked.items():
            held = self._held.get(model)
            if held is not None and held.lease.epoch <= epoch:
                del self._held[model]
            self._stopped[model] = max(epoch, self._stopped.get(model, 0))
            self._unsaid.add(model)
        for lease in orders.extended:
            self._take(lease, asked_at)
        for ticket in orders.stirred:
            if ticket in self._tickets:
                self._tickets[ticket].news.set()

    def _take(self, lease: Lease, asked_at: float) -> None:
        # The lease's life is counted from before the router was asked, so it never outlasts what the router thinks.
        if lease.epoch <= self._stopped.get(lease.model, -1):
            return
        held = self._held.get(lease.model)
        if held is None or held.lease.epoch <= lease.epoch:
            uses = held.uses if held is not None else 0
            self._held[lease.model] = _Held(lease, asked_at + lease.ttl_s, uses)

    def _ripe(self, held: _Held, now: float) -> bool:
        return held.expires - now <= RENEW_AT * held.lease.ttl_s
