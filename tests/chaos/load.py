"""Clients of the fault tests: they ask, come back when a connection breaks, and remember all that they were told."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.surfaces import events
from benchmarks.wire import Exchange, Target, exchange, now, request_bytes
from tests.chaos.checker import Seen, Told, decoded

PATIENCE_S = 60.0
"""How long a client tries to get its reply before it counts as failed."""


@dataclass(slots=True)
class Client:
    """One request on ``/api/stream-message``.

    Args:
        marker: unlike any other client's message.
        tokens: length of the scripted reply.
        leave_after_s: go away after so long and never come back.
        slow_s: pause after each piece that was read.

    ``meant``: the last refusal was the server's own word, and asking again would not help.
    """

    marker: str
    model: str
    tokens: int
    leave_after_s: float | None = None
    slow_s: float = 0.0
    told: Told = field(init=False)
    failed_before_first_byte: int = 0
    meant: bool = False
    begun: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.told = Told(self.marker, gave_up=self.leave_after_s is not None)

    async def run(self, target: Target) -> Client:
        """Ask until there is a terminal event or a refusal that is no accident, or PATIENCE_S are over."""
        self.begun = now()
        key = secrets.token_hex(16)
        while not self.told.terminals:
            result = await exchange(target, self._request(target, key), PATIENCE_S, self.leave_after_s, self.slow_s)
            self.told.connections += 1
            self._take(result)
            if self.told.gave_up or self.told.terminals or now() - self.begun > PATIENCE_S:
                break
            if self.told.refused and self.meant:
                break
            await asyncio.sleep(0.2)
        self.ended = now()
        return self

    def _request(self, target: Target, key: str) -> bytes:
        opened = self.told.first("session")
        if opened is None:
            body = {"model": self.model, "message": self.marker, "options": {"maxTokens": self.tokens}}
            headers = {"Idempotency-Key": key}
            return request_bytes(target, "/api/stream-message", json.dumps(body).encode(), headers)
        last = max((one.seq for one in self.told.seen if one.seq is not None), default=0)
        path = f"/api/stream-message/{opened['sessionId']}"
        return request_bytes(target, path, b"", {"Last-Event-ID": str(last)}, "GET")

    def _take(self, result: Exchange) -> None:
        if result.status == 200:
            self.told.refused = None
            self.told.seen += _complete(result)
            return
        if not self.told.acknowledged and (result.status >= 500 or result.status == 0):
            self.failed_before_first_byte += 1
        body = b"".join(data for _, data in result.pieces).partition(b"\r\n\r\n")[2]
        try:
            self.told.refused = json.loads(body)["error"]["code"]
            self.meant = result.status < 500 and result.status != 429
        except (ValueError, KeyError, TypeError):
            # No answer of the server's: nobody listens while a proxy is replaced, and a new one knows no path at first.
            self.told.refused, self.meant = result.error or f"HTTP {result.status}", False


def _complete(result: Exchange) -> list[Seen]:
    """The events that arrived whole: what a connection lost in the middle of one is not seen."""
    return decoded(events(result))


async def load(
    target: Target, clients: Sequence[Client], rate: float, seed: int = 0, together: bool = False
) -> list[Client]:
    """Run the clients, Poisson arrivals at ``rate`` per second (or all at once)."""
    rng = random.Random(seed)
    tasks = []
    for client in clients:
        tasks.append(asyncio.create_task(client.run(target)))
        if not together:
            await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def clients(count: int, model: str, tokens: int, name: str, **more: float) -> list[Client]:
    """``count`` clients with markers of their own."""
    run = secrets.token_hex(4)
    return [Client(f"{name} {run} {number}", model, tokens, **more) for number in range(count)]
