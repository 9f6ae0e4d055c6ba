"""What a reply costs the store itself: processor time of this process and of the database's server, nothing else there.

``python -m benchmarks.scenarios.store_reply`` writes replies as an ingress does (begin in a conversation of their own,
first text, end), sixteen at a time, and ticks of the log with some text of 64 streams, on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psutil

from benchmarks.machine import CpuMeter
from benchmarks.protocol import Contender, Result, measure, parser, rounds_of
from benchmarks.scenarios.store_cost import DATABASES, Processes, database
from serve_app.domain.conversation import SessionStatus
from serve_app.domain.events import Ended, Numbered, SessionOpened, Token
from serve_app.domain.generation import FinishReason, Timing, Usage
from serve_app.domain.stream_log import Entry, LogRow, Origin, rows_of
from serve_app.domain.wanted import Wanted
from serve_app.store.records import NewConversation, NewSession, new_id
from serve_app.store.store import Store

OWNER, MODEL, PROVIDER = "ingress", "bench/model", "huggingface"
ORIGIN = Origin(MODEL, PROVIDER, 1, None, (7,))
AT_ONCE, STREAMS, TICKS = 16, 64, 20
PER_TICK = 25
"""Tokens of each stream in a tick."""


async def begin(store: Store) -> tuple[str, str]:
    """A conversation with a question, and the session that answers it."""
    session, conversation = new_id(), new_id()
    new = NewSession(session, conversation, MODEL, PROVIDER, OWNER, 600, 600_000, "0" * 32, Wanted(model=MODEL))
    await store.begin_reply(new, text="What is 17 + 25?", conversation=NewConversation(conversation, "A sum", MODEL))
    return session, conversation


async def reply(store: Store) -> None:
    """All that a short reply writes."""
    session, conversation = await begin(store)
    opened = SessionOpened(session, conversation, MODEL, PROVIDER, "0" * 32)
    first = [Entry(Numbered(1, opened), ORIGIN), Entry(Numbered(2, Token("17 + 25 = 42.", 0)), ORIGIN)]
    await store.write_log(OWNER, [session], {session: rows_of(first, 0, 1)})
    message = new_id()
    ended = Ended(message, Usage(9, 1), Timing(), FinishReason.STOP)
    await store.finish_session(
        session,
        epoch=1,
        status=SessionStatus.COMPLETED,
        text="17 + 25 = 42.",
        token_count=1,
        model=MODEL,
        provider=PROVIDER,
        usage=Usage(9, 1),
        timing=Timing(),
        finish_reason="stop",
        message_id=message,
        rows=rows_of([Entry(Numbered(3, ended), ORIGIN)], 13, 1),
    )


def text(number: int) -> Sequence[LogRow]:
    """The rows of one stream in the tick ``number``."""
    first = number * PER_TICK
    entries = [Entry(Numbered(1 + n, Token("word ", 5 * n)), ORIGIN) for n in range(first, first + PER_TICK)]
    return rows_of(entries, 5 * first, 1)


class Writer:
    """A store, and what using it costs."""

    def __init__(self, kind: str, url: str, server: Processes, replies: int) -> None:
        self._server, self._replies = server, replies
        self._runner = asyncio.Runner()
        self._store = self._runner.run(Store.open(url))
        self.contender = Contender(kind, lambda seed: self._runner.run(self._round()), server)

    def close(self) -> None:
        self._runner.run(self._store.close())
        self._runner.close()

    def _meter(self) -> CpuMeter:
        return CpuMeter(lambda: [psutil.Process(), *self._server()])

    async def _round(self) -> dict[str, float]:
        async def some() -> None:
            for _ in range(self._replies // AT_ONCE):
                await reply(self._store)

        with self._meter() as replies:
            await asyncio.gather(*(some() for _ in range(AT_ONCE)))
        sessions = [session for session, _ in await asyncio.gather(*(begin(self._store) for _ in range(STREAMS)))]
        batches = [dict.fromkeys(sessions, text(number)) for number in range(TICKS)]
        with self._meter() as ticks:
            for batch in batches:
                await self._store.write_log(OWNER, sessions, batch)
        return {
            "reply_ms": replies.spent.total / (self._replies // AT_ONCE * AT_ONCE) * 1000,
            "tick_ms": ticks.spent.total / TICKS * 1000,
        }


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--replies", type=int, help="of a round (default 320; 64 with --quick)")
    given = arguments.parse_args()
    replies = given.replies or (64 if given.quick else 320)
    result = Result.begin("store_reply", "What a reply costs the store itself", given)
    result.settings |= {"replies": replies, "at_once": AT_ONCE, "streams_of_a_tick": STREAMS}
    for kind in DATABASES:
        with database(kind) as (url, server):
            writer = Writer(kind, url, server, replies)
            try:
                found = measure([writer.contender], rounds_of(given), given.seed, f"{kind}:")
            finally:
                writer.close()
        result.add(
            found,
            found.value(f"{kind}: CPU of one reply (begin, first text, end)", kind, "reply_ms", "ms"),
            found.value(f"{kind}: CPU of one tick of the log, with text of {STREAMS} streams", kind, "tick_ms", "ms"),
        )
        result.details[kind] = found.rounds
    result.write()


if __name__ == "__main__":
    main()
