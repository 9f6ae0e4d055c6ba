"""The line of waiting requests: priority, then fairness between callers, then age; one place per model."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.domain.generation import Priority
from serve_app.domain.rotation_effects import Notify
from serve_app.domain.rotation_events import Request

Rank = tuple[int, int, float, float, int]
Caller = tuple[Priority, str]


@dataclass(slots=True)
class Ticket:
    """One waiting request; ``choice`` is the index of the model that it waits for among ``request.models``."""

    request: Request
    asked_at: float
    number: int
    touched_at: float
    tag: float = 0.0
    choice: int = 0
    told: Notify | None = None

    @property
    def id(self) -> str:
        return self.request.ticket

    @property
    def model(self) -> str:
        return self.request.models[self.choice]

    @property
    def priority(self) -> Priority:
        return self.request.priority

    @property
    def caller(self) -> Caller:
        return self.request.priority, self.request.caller


@dataclass(slots=True)
class Line:
    """Waiting tickets, grouped by the model they wait for.

    Fairness is start-time fair queueing (P. Goyal et al., SIGCOMM 1996) with one *model* waited for as the unit: a
    ticket's tag is one above its caller's last tag, or the line's virtual time if that is later. So a caller who asks
    for a hundred cold models gets every second load while another caller waits, and many tickets for one model cost
    their caller one unit.
    """

    tickets: dict[str, Ticket] = field(default_factory=dict)
    groups: dict[str, dict[str, Ticket]] = field(default_factory=dict)
    _served: dict[Caller, float] = field(default_factory=dict)
    """Callers who were served ahead of virtual time, each with the least tag of their next ticket."""
    _virtual: dict[Priority, float] = field(default_factory=dict)
    _number: int = 0

    def __len__(self) -> int:
        return len(self.tickets)

    def __repr__(self) -> str:
        groups = ", ".join(f"{model}: {' '.join(group)}" for model, group in self.groups.items())
        return f"Line({groups})"

    def join(self, request: Request, asked_at: float, now: float, choice: int) -> Ticket:
        """Put a request in its place."""
        self._number += 1
        ticket = Ticket(request, asked_at, self._number, now, choice=choice)
        self._place(ticket)
        return ticket

    def move(self, ticket: Ticket, choice: int) -> None:
        """Let a ticket wait for another of its models; it keeps its age."""
        self.leave(ticket)
        ticket.choice, ticket.told = choice, None
        self._place(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket out. One that was not served leaves no debt behind."""
        del self.tickets[ticket.id]
        group = self.groups[ticket.model]
        del group[ticket.id]
        if not group:
            del self.groups[ticket.model]

    def served(self, model: str) -> None:
        """A load starts for ``model``: its callers are debited, and virtual time moves on to its best ticket."""
        group = self.groups.get(model)
        if not group:
            return
        for ticket in group.values():
            self._served[ticket.caller] = max(self._served.get(ticket.caller, 0.0), ticket.tag + 1)
        first = min(group.values(), key=lambda ticket: (ticket.priority, ticket.tag))
        virtual = max(self._virtual.get(first.priority, 0.0), first.tag)
        self._virtual[first.priority] = virtual
        self._served = {key: tag for key, tag in self._served.items() if key[0] != first.priority or tag > virtual}

    def retag(self) -> None:
        """Give all tags anew by age, after tickets came back in any order."""
        waiting = sorted(self.tickets.values(), key=lambda ticket: (ticket.asked_at, ticket.number))
        self.tickets.clear()
        self.groups.clear()
        for ticket in waiting:
            self._place(ticket)

    def ordered(self, now: float, urgent_s: float, first_come: bool) -> list[tuple[str, Ticket]]:
        """The models that are waited for, best ticket first; ``first_come`` leaves only age.

        Tickets older than ``urgent_s`` go before all others, by age: no flood of a higher priority starves them, and
        serving the oldest first keeps the longest wait as short as it can be.
        """
        heads = []
        for model, group in self.groups.items():
            ranks = ((self._rank(ticket, now, urgent_s, first_come), ticket) for ticket in group.values())
            heads.append((*min(ranks, key=lambda pair: pair[0]), model))
        return [(model, ticket) for _, ticket, model in sorted(heads, key=lambda head: head[0])]

    def group(self, model: str) -> list[Ticket]:
        """The tickets that wait for ``model``, in the order in which they are granted."""
        group = self.groups.get(model, {})
        return sorted(group.values(), key=lambda ticket: (ticket.priority, ticket.asked_at, ticket.number))

    def _place(self, ticket: Ticket) -> None:
        ticket.tag = self._tag(ticket)
        self.tickets[ticket.id] = ticket
        self.groups.setdefault(ticket.model, {})[ticket.id] = ticket

    def _tag(self, ticket: Ticket) -> float:
        own = [other for other in self.tickets.values() if other.caller == ticket.caller]
        same = [other.tag for other in own if other.model == ticket.model]
        if same:
            return same[0]
        ahead = max((other.tag + 1 for other in own), default=0.0)
        return max(self._virtual.get(ticket.priority, 0.0), self._served.get(ticket.caller, 0.0), ahead)

    @staticmethod
    def _rank(ticket: Ticket, now: float, urgent_s: float, first_come: bool) -> Rank:
        if first_come or now - ticket.asked_at >= urgent_s:
            return (0, 0, 0.0, ticket.asked_at, ticket.number)
        return (1, ticket.priority, ticket.tag, ticket.asked_at, ticket.number)
