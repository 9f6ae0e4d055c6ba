"""What the store costs: the platform with its log on SQLite and on PostgreSQL, against itself with a store that keeps
nothing.

``python -m benchmarks.scenarios.store_cost`` asks, on each database, for 64 streams of a known pace (one token per
20 ms) and compares the tokens per second that arrive while all of them run; then for 64 streams whose tokens are all
due at once, and compares the CPU per token of all processes but the client, PostgreSQL's and what a reply costs at its
begin and end included. The other side is the same gateway on the same surface with :mod:`benchmarks.peers.forgetful`.
Then, of the platform with its store: how long the engine goes on when somebody ends a stream, and what the first page
of a long conversation takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median

import httpx
import psutil
from sqlalchemy import insert

from benchmarks.protocol import Contender, Result, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import contender, rate_kept, scripted
from benchmarks.servers import Server, rotunda
from serve_app.store import migrate
from serve_app.store.engine import make_engine, parse_url, writer
from serve_app.store.records import utc_now
from serve_app.store.store import Store
from serve_app.store.tables import messages
from tests.cluster import wait_until
from tests.postgres import Postgres

STREAMS = 64
PACE = 0.02
TICK = 0.1
PACED, AT_ONCE = "bench/paced", "bench/at-once"
FORGETFUL = "benchmarks.peers.forgetful:build"
DATABASES = ("SQLite", "PostgreSQL")
ENDED_AT = 25
"""Tokens after which a stream is ended."""
LONG, SHORT = 10_000, 100
PAGE = "{ id text sender status timestamp images { id url } }"
Processes = Callable[[], Iterable[psutil.Process]]
OPENED = f"query Open($id: String!) {{ conversation(id: $id) {{ id tabName messageCount messages(last: 50) {PAGE} }} }}"
FIRST = f"query First($id: String!) {{ messages(conversationId: $id, limit: 50) {PAGE} }}"


@contextmanager
def database(kind: str) -> Iterator[tuple[str, Processes]]:
    """A migrated database of its own: its URL, and the processes of its server."""
    if kind == "SQLite":
        with tempfile.TemporaryDirectory(prefix="rotunda-bench-") as folder:
            url = f"sqlite+aiosqlite:///{folder}/rotunda.db"
            migrate.upgrade(url)
            yield url, list
        return
    server = Postgres(durable=True)
    server.start()
    try:
        url = server.create("bench")
        migrate.upgrade(url)
        yield url, server.processes
    finally:
        server.remove()


def counted(server: Server, figure: str, model: str) -> float:
    """A counter of a model's engine, as ``/metrics`` exports it; 0 before there is any."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).raise_for_status().text
    lines = [line for line in text.splitlines() if line.startswith(figure) and f'model="{model}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def ended(server: Server, streams: int) -> Contender:
    """``streams`` streams, each ended by a request of somebody else once it has said some words.

    What the engine made after the request was sent, in seconds: (tokens that the engine counts − tokens that had
    arrived at the moment of the request) · PACE. The request comes to any of the ingresses.
    """

    def one_round(seed: int) -> dict[str, float]:
        engine_before = counted(server, "rotunda_engine_tokens", PACED)
        found = asyncio.run(_end_all(server, streams))
        made = sum(told for _, told, _ in found)
        wait_until(lambda: counted(server, "rotunda_engine_tokens", PACED) - engine_before >= made, 10, 0.5, "counters")
        time.sleep(1.0)  # the next report of the replica tells what the engine went on to make, if anything
        engine = counted(server, "rotunda_engine_tokens", PACED) - engine_before
        return {
            "engine_ms": (engine - sum(seen for seen, _, _ in found)) / streams * PACE * 1000,
            "worst_ms": max(told - seen for seen, told, _ in found) * PACE * 1000,
            "answer_ms": median(took for _, _, took in found) * 1000,
        }

    return Contender(server.name, one_round, server.processes)


async def _end_all(server: Server, streams: int) -> list[tuple[int, int, float]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        return await asyncio.gather(*(_end_one(client, 8 * ENDED_AT * number // streams) for number in range(streams)))


async def _end_one(client: httpx.AsyncClient, more: int) -> tuple[int, int, float]:
    """Tokens that had come when the end was asked for, tokens of the reply, seconds until the answer."""
    body = {"model": PACED, "message": "to be ended", "options": {"maxTokens": 100_000}}
    session: dict[str, str] = {}
    seen = told = 0
    asking: asyncio.Task[float] | None = None
    async with client.stream("POST", "/api/stream-message", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = json.loads(line.removeprefix("data: "))
            session = session or data
            told = data.get("tokenCount", told)
            seen += "token" in data and asking is None
            if seen >= ENDED_AT + more and asking is None:
                asking = asyncio.create_task(_ask_to_end(client, session))
    assert asking is not None, "the stream ended by itself"
    return seen, told, await asking


async def _ask_to_end(client: httpx.AsyncClient, session: dict[str, str]) -> float:
    began = time.perf_counter()
    body = {"sessionId": session["sessionId"], "conversationId": session["conversationId"]}
    answer = (await client.post("/api/terminate-stream", json=body)).raise_for_status().json()
    assert answer["success"], answer
    return time.perf_counter() - began


async def fill(url: str, conversations: dict[str, int]) -> None:
    """Store conversations with so many messages each."""
    store = await Store.open(url)
    for id, count in conversations.items():
        await store.create_conversation(id, f"{count} messages", PACED)
    await store.close()
    engine = writer(make_engine(parse_url(url)))
    now = utc_now()
    for id, count in conversations.items():
        rows = [
            {
                "id": f"{id}-{seq}", "conversation_id": id, "text": f"message {seq} " + "word " * 40, "seq": seq,
                "sender": "llm" if seq % 2 == 0 else "user", "timestamp": now, "created_at": now, "has_images": False,
                "status": "complete", "model": PACED, "provider": "huggingface",
            }
            for seq in range(1, count + 1)
        ]  # fmt: skip
        async with engine.begin() as connection:
            await connection.execute(insert(messages), rows)
    await engine.dispose()


def opened(server: Server, id: str, times: int) -> Contender:
    """Open a conversation so often: with its last page, and with its first."""

    def one_round(seed: int) -> dict[str, float]:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            return {
                "opened_ms": median(_asked(client, OPENED, id) for _ in range(times)) * 1000,
                "first_ms": median(_asked(client, FIRST, id) for _ in range(times)) * 1000,
            }

    return Contender(id, one_round, server.processes)


def _asked(client: httpx.Client, query: str, id: str) -> float:
    """Seconds that a query took; its page must be whole."""
    began = time.perf_counter()
    answer = client.post("/graphql", json={"query": query, "variables": {"id": id}}).raise_for_status().json()
    took = time.perf_counter() - began
    data = answer["data"]
    assert len(data.get("messages") or data["conversation"]["messages"]) == 50, answer
    return took


def compare(result: Result, kind: str, on: Server, off: Server, tokens: int, rounds: int, seed: int) -> None:
    """The rate at a known pace, and the CPU per token with and without one."""
    for what, model in (("paced", PACED), ("all due at once", AT_ONCE)):
        over_s = 2.0 if what == "paced" else 0.0
        sides = [
            contender(replace(server, name=name, model=model), STREAMS, tokens, PACE, over_s)
            for name, server in (("on", on), ("off", off))
        ]
        found = measure(sides, rounds, seed, f"{kind}, {what}:")
        at = f"{kind}, {STREAMS} streams, {what}"
        rate = rate_kept(result, found, at, Target(at_least=0.97)) if what == "paced" else []
        cpu = found.ratio(f"{at}: CPU per token, on over off", "on", "off", "cpu_us_per_token", "µs",
                          Target(at_most=None if what == "paced" else 1.15))  # fmt: skip
        result.add(found, *rate, cpu)
        result.details[f"{kind}, {what}"] = found.rounds


def observe(result: Result, kind: str, on: Server, url: str, given: argparse.Namespace) -> None:
    """How fast the engine stops, and how fast a long conversation opens."""
    streams, times = (8, 10) if given.quick else (32, 60)
    found = measure([ended(on, streams)], rounds_of(given), given.seed, f"{kind}, ended:")
    at, within = f"{kind}, {streams} streams ended", Target(at_most=(TICK + PACE) * 1000)
    for what, figure, unit, target in (
        ("what the engine still makes, mean", "engine_ms", "ms", within),
        ("what still arrives at the ingress, longest of a round", "worst_ms", "ms", Target()),
        ("until the answer, p50", "answer_ms", "ms", Target()),
    ):
        result.add(found, found.value(f"{at}: {what}", on.name, figure, unit, target))
    asyncio.run(fill(url, {"long": LONG, "short": SHORT}))
    sides = [opened(on, "long", times), opened(on, "short", times)]
    found = measure(sides, rounds_of(given), given.seed, f"{kind}, opened:")
    for what, figure in (("its last page", "opened_ms"), ("its first page", "first_ms")):
        named = f"{kind}, a conversation of {LONG:,} messages: {what} against one of {SHORT}"
        result.add(found, found.ratio(named, "long", "short", figure, "ms", Target(at_most=2.0)))
    result.details[f"{kind}, observed"] = found.rounds


def _both(one: Processes, other: Processes) -> Processes:
    return lambda: [*one(), *other()]


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--tokens", type=int, help="of each stream (default 500; 150 with --quick)")
    arguments.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    arguments.add_argument("--ingresses", type=int, default=2, help="as many as serve_config.yaml runs, if not said")
    given = arguments.parse_args()
    tokens = given.tokens or (150 if given.quick else 500)
    result = Result.begin("store_cost", "What the store costs", given)
    result.settings |= {"streams": STREAMS, "tokens": tokens, "pace_s": PACE, "ingresses": given.ingresses}
    models = [
        scripted(options={"pace": PACE, "tokens": 1_000_000, "in_step": True}, max_tokens=1_000_000),
        scripted(model=AT_ONCE, options={"pace": 0.0, "tokens": 1_000_000}),
    ]
    gateway = {"ingress_min_replicas": given.ingresses, "ingress_max_replicas": given.ingresses}
    with ExitStack() as stack:
        off = stack.enter_context(rotunda(models, gateway=gateway, gateway_from=FORGETFUL))
        for kind in given.databases:
            with ExitStack() as beside:
                url, processes = beside.enter_context(database(kind))
                on = beside.enter_context(rotunda(models, gateway=gateway, environment={"DATABASE_URL": url}))
                on = replace(on, processes=_both(on.processes, processes))
                compare(result, kind, on, off, tokens, rounds_of(given), given.seed)
                observe(result, kind, on, url, given)
    result.write()


if __name__ == "__main__":
    main()
