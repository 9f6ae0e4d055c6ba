"""Drives one :class:`~serve_app.domain.rotation.Rotation`: gives it the time, keeps answers until somebody asks.

It lives on one event loop, which makes it the one writer that rotation wants. Whatever concerns a replica goes to
``perform``; whatever concerns a gateway waits here for the gateway's next question.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from serve_app.domain.leasing import Orders, Report
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_effects import Effect, Extend, Grant, Notify, Refuse, Revoke
from serve_app.domain.rotation_events import Acknowledged, Cancel, Claimed, Event, LeaseRenewed, Request, Tick
from serve_app.domain.routing import Lease

logger = logging.getLogger(__name__)

Answer = Grant | Refuse | Notify
QUIET = frozenset({"grant", "queued"})
"""What happens with every request is not logged."""
HOLD_S = 0.5
"""How long a gateway's call is kept open for news."""
TICK_S = 0.5
"""Time passes for the rotation at least so often."""
ASKED_AFTER_S = 3.0
"""The rotation is told so often that a request is still wanted; it forgets those of which it hears no more."""
UNCLAIMED_S = 10.0
"""An answer that nobody asks for is dropped after so long; its lease has ended long before."""


@dataclass(slots=True)
class _Holder:
    """What one gateway is to be told."""

    heard_at: float
    news: asyncio.Event = field(default_factory=asyncio.Event)
    extended: list[Lease] = field(default_factory=list)
    denied: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Ticket:
    """A request that waits, or whose answer does."""

    request: Request
    asked_after_at: float
    answer: Grant | Refuse | None = None
    answered_at: float = 0.0
    shown: Answer | None = None
    """What its gateway knows."""
    announced: Answer | None = None
    """News of which its gateway was told that there is some, and when."""
    announced_at: float = float("-inf")


class Rotor:
    """See the module.

    Args:
        rotation: the decisions; nobody else may pass events to it.
        perform: carries out what concerns replicas, and logs; must not wait.
        clock: seconds, on the rotation's clock.
    """

    def __init__(self, rotation: Rotation, perform: Callable[[Effect], None], clock: Callable[[], float]) -> None:
        self.rotation = rotation
        self.catalogue = 0
        """Counts the changes of the catalogue, for the gateways that remember what a name means."""
        self._perform = perform
        self._clock = clock
        self._holders: dict[str, _Holder] = {}
        self._tickets: dict[str, _Ticket] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._started = False
        self._arming = False

    def __repr__(self) -> str:
        return f"Rotor({self.rotation!r}; tickets: {len(self._tickets)})"

    @property
    def now(self) -> float:
        """Seconds on the rotation's clock."""
        return self._clock()

    def start(self) -> None:
        """Let time pass from now on, on the running event loop."""
        self._started = True
        self._arm()

    def stop(self) -> None:
        """Let time stand still."""
        self._started = False
        self._disarm()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def tell(self, event: Event) -> None:
        """Pass an event on, and carry out what comes of it."""
        before = self.rotation.state.noted
        effects = self.rotation.handle(event, self._clock())
        self._log(self.rotation.state.noted - before)
        for effect in effects:
            match effect:
                case Grant() | Refuse():
                    self._answered(effect)
                case Notify():
                    self._wake(self._tickets[effect.ticket].request.holder) if effect.ticket in self._tickets else None
                case Extend():
                    self._holder(effect.holder).extended.append(effect.lease)
                case Revoke():
                    self._holder(effect.holder).denied[effect.model] = effect.epoch
                    self._wake(effect.holder)
                case _:
                    self._perform(effect)
        if not self._arming and self._started:
            self._arming = True
            asyncio.get_running_loop().call_soon(self._arm)

    def ask(self, request: Request) -> Answer:
        """The answer to a request, or what there is to say while it waits."""
        known = self._tickets.setdefault(request.ticket, _Ticket(request, 0.0))
        known.request, known.asked_after_at = request, self._clock()
        if known.answer is None:
            self.tell(request)
        while isinstance(grant := known.answer, Grant) and request.lease and grant.lease is None:
            known.answer = None  # a promise, of now or of long ago: the model may have left since
            self.tell(Claimed(request, grant.model, grant.reason))
        if known.answer is not None:
            del self._tickets[request.ticket]
            return known.answer
        told = self.rotation.waiting(request.ticket)
        assert told is not None, f"{request.ticket} is neither answered nor waiting"
        known.shown = told
        return told

    def cancel(self, ticket: str) -> None:
        """Forget a request."""
        self._tickets.pop(ticket, None)
        self.tell(Cancel(ticket))

    async def sync(self, report: Report) -> Orders:
        """Take a gateway's report, and answer as soon as there is something to say, or after ``HOLD_S``."""
        for model, epoch in report.stopped.items():
            self.tell(Acknowledged(report.holder, model, epoch, report.running.get(model, 0)))
        for model, uses in report.used.items():
            self.tell(LeaseRenewed(report.holder, model, uses))
        for ticket in report.tickets:
            known, now = self._tickets.get(ticket), self._clock()
            if known is not None and known.answer is None and now - known.asked_after_at > ASKED_AFTER_S:
                known.asked_after_at = now
                self.tell(known.request)
        holder = self._holder(report.holder)
        holder.heard_at = self._clock()
        orders = self._orders(holder, report)
        if not orders.urgent:
            holder.news.clear()
            try:
                async with asyncio.timeout(HOLD_S):
                    await holder.news.wait()
            except TimeoutError:
                pass
            orders = self._orders(holder, report)
        return orders

    def _log(self, new: int) -> None:
        for decision in islice(reversed(self.rotation.state.history), new):
            if decision.action not in QUIET:
                victims = f" ({', '.join(decision.victims)})" if decision.victims else ""
                logger.info("%s %s%s: %s", decision.action, decision.model, victims, decision.reason)

    def _orders(self, holder: _Holder, report: Report) -> Orders:
        extended, holder.extended = tuple(holder.extended), []
        denied, holder.denied = holder.denied, {}
        for resident in self.rotation.state.residency.residents.values():
            if resident.retirement is not None and report.holder in resident.leases:
                denied[resident.name] = resident.retirement.revoked
        stirred = tuple(ticket for ticket in self._tickets_of(report) if self._is_stirred(ticket))
        return Orders(extended, denied, stirred, self.catalogue)

    def _tickets_of(self, report: Report) -> set[str]:
        mine = {ticket for ticket, known in self._tickets.items() if known.request.holder == report.holder}
        return mine | set(report.tickets)

    def _is_stirred(self, ticket: str) -> bool:
        """Whether there is news of a ticket; what was announced just now is on its way and not announced again."""
        known = self._tickets.get(ticket)
        if known is None:
            return True
        news = known.answer or self.rotation.waiting(ticket)
        now = self._clock()
        if news is known.shown or (news is known.announced and now - known.announced_at < HOLD_S):
            return False
        known.announced, known.announced_at = news, now
        return True

    def _answered(self, answer: Grant | Refuse) -> None:
        known = self._tickets.get(answer.ticket)
        if known is not None:
            known.answer, known.answered_at = answer, self._clock()
            self._wake(known.request.holder)

    def _holder(self, name: str) -> _Holder:
        return self._holders.setdefault(name, _Holder(self._clock()))

    def _wake(self, holder: str) -> None:
        self._holder(holder).news.set()

    def _tick(self) -> None:
        now, waiting = self._clock(), self.rotation.waiting
        for ticket, known in list(self._tickets.items()):
            if now - known.answered_at > UNCLAIMED_S if known.answer else waiting(ticket) is None:
                del self._tickets[ticket]
        for name, holder in list(self._holders.items()):
            if now - holder.heard_at > UNCLAIMED_S:
                del self._holders[name]
        self._due = math.inf
        self.tell(Tick())

    def _arm(self) -> None:
        """See to it that time passes when the rotation next depends on it."""
        self._arming = False
        now, wanted = self._clock(), self.rotation.wake_at()
        due = now + TICK_S if wanted is None else min(now + TICK_S, max(now + 0.01, wanted))
        if due < self._due and self._started:
            self._disarm()
            self._due = due
            self._timer = asyncio.get_running_loop().call_later(due - now, self._tick)
