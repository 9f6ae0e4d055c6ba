"""Whoever dies, no reply is lost: processes are killed and databases taken away half-way through 20 streams.

One cluster for each database, with two ingresses and a scripted model whose whole text is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.domain.stream_log import Transcript
from serve_app.store import Store, migrate
from tests.cluster import Cluster, model_application, wait_until
from tests.ollama_server import nothing_listens
from tests.postgres import Postgres
from tests.serve.test_fleet import pids
from tests.serve.test_remote_providers import upstream
from tests.sse import events

pytestmark = [pytest.mark.own_cluster, pytest.mark.timeout(600)]

STREAMS, TOKENS, PACE = 20, 300, 0.02
TEXT = " ".join(f"word{n}" for n in range(TOKENS))
MODEL = "test/paced"
TERMINAL = {"end", "terminated", "error"}
PATIENCE_S = 120.0
AWAY_S = 5.0


@dataclass
class Platform:
    """A cluster and what its database is."""

    cluster: Cluster
    url: str
    postgres: Postgres | None


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def platform(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    home = tmp_path_factory.mktemp(f"durable-{request.param}")
    server: Postgres | None = None
    url = f"sqlite+aiosqlite:///{home / 'data' / 'rotunda.db'}"
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        url = server.create("durable")
        migrate.upgrade(url)
    model = model_application("model-paced", model=MODEL, engine="scripted", options={"tokens": TOKENS, "pace": PACE})
    model["args"] |= {"max_concurrency": 64}
    with nothing_listens() as nowhere:
        cluster = Cluster(home, [model, upstream("gone", nowhere)], environment={"DATABASE_URL": url})
        with started(cluster):
            yield Platform(cluster, url, server)


@contextlib.contextmanager
def started(cluster: Cluster) -> Iterator[None]:
    with cluster.running():
        wait_until(lambda: httpx.get(f"{cluster.url}/ready", timeout=30).status_code == 200, 30, what="/ready")
        yield


@dataclass
class Viewer:
    """A client that comes back, as a browser's EventSource does, until its stream has ended."""

    cluster: Cluster
    message: str
    session: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    last: int = 0
    ends: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    rewinds: int = 0
    returns: int = 0
    faults: list[str] = field(default_factory=list)
    model: str = MODEL

    async def watch(self, client: httpx.AsyncClient) -> Viewer:
        key = secrets.token_hex(16)
        deadline = time.monotonic() + PATIENCE_S
        while not self.ends:
            assert time.monotonic() < deadline, f"{self}: no end"
            with contextlib.suppress(httpx.HTTPError):
                if self.session:
                    path = f"/api/stream-message/{self.session['sessionId']}"
                    self.returns += 1
                    asked = client.stream("GET", path, headers={"Last-Event-ID": str(self.last)} if self.last else {})
                else:
                    body = {"message": self.message, "model": self.model}
                    asked = client.stream("POST", "/api/stream-message", json=body, headers={"Idempotency-Key": key})
                async with asked as response:
                    if response.status_code == 200:
                        async for event in events(response):
                            self._take(event.name, event.id, event.data)
            if not self.ends:
                await asyncio.sleep(0.2)
        return self

    def _take(self, name: str | None, seq: int | None, data: Any) -> None:
        if name == ":":
            return
        assert seq is not None
        if name == "rewind":
            self.rewinds += 1
            self.text, self.last = self.text[: data["offset"]], data["seq"]
            return
        if seq != self.last + 1:
            self.faults.append(f"event {seq} after {self.last}")
        self.last = seq
        if name is None:
            if data["offset"] != len(self.text):
                self.faults.append(f"text at {data['offset']} after {len(self.text)}")
            self.text += data["token"]
        elif name == "session":
            self.session = data
        elif name in TERMINAL:
            self.ends.append((name, data))


@contextlib.asynccontextmanager
async def clients(platform: Platform) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=platform.cluster.url, timeout=60, limits=limits) as client:
        yield client


async def disturbed(platform: Platform, disturb: Callable[[list[Viewer]], Awaitable[None]]) -> list[Viewer]:
    """20 streams, and what disturbs them when each is half-way; a second viewer of each joins after that."""
    viewers = [Viewer(platform.cluster, f"stream {number}") for number in range(STREAMS)]
    async with clients(platform) as client:
        watching = [asyncio.create_task(viewer.watch(client)) for viewer in viewers]
        async with asyncio.timeout(60):
            while min(len(viewer.text.split()) for viewer in viewers) < TOKENS // 3:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await disturb(viewers)
        late = [Viewer(platform.cluster, viewer.message, viewer.session) for viewer in viewers]
        await asyncio.gather(*watching, *(viewer.watch(client) for viewer in late))
    for viewer, second in zip(viewers, late, strict=True):
        assert (second.text, second.ends, second.faults) == (viewer.text, viewer.ends, []), (viewer, second)
    return viewers


async def check(platform: Platform, viewers: list[Viewer]) -> None:
    """What every client holds is the whole text, the log and the stored message; one end each, and no gap."""
    store = await Store.open(platform.url)
    try:
        for viewer in viewers:
            assert viewer.faults == [], viewer
            assert [name for name, _ in viewer.ends] == ["end"], viewer.ends
            assert viewer.text == TEXT, viewer
            _, rows = (await store.read_log({viewer.session["sessionId"]: 0}))[viewer.session["sessionId"]]
            told = Transcript()
            told.add(rows)
            assert told.text == TEXT
            assert [one.seq for one in told.events if one.event.terminal] == [len(told.events)]
            assert told.token_ids == list(range(TOKENS))
            messages = await store.list_messages(viewer.session["conversationId"])
            assert [message.text for message in messages] == [viewer.message, TEXT]
            assert messages[1].id == viewer.ends[0][1]["messageId"]
            assert viewer.ends[0][1]["usage"]["completionTokens"] == TOKENS
    finally:
        await store.close()


def ingresses(platform: Platform) -> list[int]:
    return [pid for name, pid in pids(platform.cluster).items() if name.startswith("gateway/ingress")]


async def settled(platform: Platform) -> None:
    """Two ingresses again, and both answer."""
    await asyncio.to_thread(wait_until, lambda: len(ingresses(platform)) == 2, 60, 0.5, "two ingresses")
    await asyncio.to_thread(
        wait_until, lambda: httpx.get(f"{platform.cluster.url}/ready", timeout=30).status_code == 200, 60, 0.5, "/ready"
    )


@contextlib.asynccontextmanager
async def away(platform: Platform) -> AsyncIterator[None]:
    """The database cannot be used: PostgreSQL is stopped, SQLite's file locked."""
    if platform.postgres is not None:
        await asyncio.to_thread(platform.postgres.stop)
        try:
            yield
        finally:
            await asyncio.to_thread(platform.postgres.start)
        return
    file = Path(platform.url.removeprefix("sqlite+aiosqlite:///"))
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        yield
        holder.execute("ROLLBACK")


async def test_a_killed_ingress_loses_nothing(platform: Platform) -> None:
    await settled(platform)

    async def kill(viewers: list[Viewer]) -> None:
        os.kill(ingresses(platform)[0], signal.SIGKILL)

    viewers = await disturbed(platform, kill)
    await check(platform, viewers)
    assert sum(viewer.returns > 0 for viewer in viewers) >= 1, "the killed ingress had no stream"


async def test_a_killed_model_replica_loses_nothing(platform: Platform) -> None:
    """Every stream goes on with the next replica from the tokens that were told; no client has to come back."""
    await settled(platform)

    async def kill(viewers: list[Viewer]) -> None:
        (replica,) = [pid for name, pid in pids(platform.cluster).items() if name.startswith("model-paced/")]
        os.kill(replica, signal.SIGKILL)

    viewers = await disturbed(platform, kill)
    await check(platform, viewers)
    assert [viewer.returns for viewer in viewers] == [0] * STREAMS


async def test_the_models_are_listed_whatever_is_away(platform: Platform) -> None:
    """A provider that is down says so, and hides no other; the conversations' database has no part in it."""
    await settled(platform)
    async with clients(platform) as client:
        async with asyncio.timeout(60):
            while not (await listed(client)).get("gone", {}).get("error"):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        async with away(platform):
            for _ in range(6):  # whichever ingress answers
                seen = await listed(client)
                assert (seen["gone"]["status"], seen["huggingface"]["status"]) == ("error", "ok")
                assert "cannot be reached" in seen["gone"]["error"]
    await settled(platform)


async def listed(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    """The providers, as ``availableModels`` tells them within 2 s beside every model that there is."""
    query = "{ availableModels { models providers { name status error modelCount } } }"
    asked = time.monotonic()
    answer = (await client.post("/graphql", json={"query": query})).json()
    assert time.monotonic() - asked < 2
    assert "errors" not in answer, answer
    assert answer["data"]["availableModels"]["models"] == [MODEL]
    return {provider["name"]: provider for provider in answer["data"]["availableModels"]["providers"]}


async def test_a_database_that_is_away_for_5_s_loses_nothing(platform: Platform) -> None:
    await settled(platform)

    async def take_away(viewers: list[Viewer]) -> None:
        before = sum(len(viewer.text) for viewer in viewers)
        async with asyncio.timeout(60), away(platform):
            await asyncio.sleep(AWAY_S)
        # The tokens did not wait for the log.
        assert sum(len(viewer.text) for viewer in viewers) > before

    viewers = await disturbed(platform, take_away)
    await check(platform, viewers)
    epochs = await _epochs(platform, viewers)
    assert set(epochs) == {1}, "owners that could not renew were taken for dead"


async def _epochs(platform: Platform, viewers: list[Viewer]) -> Counter[int]:
    store = await Store.open(platform.url)
    try:
        return Counter([(await store.get_session(viewer.session["sessionId"])).epoch for viewer in viewers])
    finally:
        await store.close()


async def test_serve_deploy_with_a_changed_gateway_loses_nothing(platform: Platform) -> None:
    await settled(platform)
    before = set(ingresses(platform))

    async def deploy(viewers: list[Viewer]) -> None:
        gateway = platform.cluster.config["applications"][0]["args"]
        gateway["settings"] = {**gateway.get("settings", {}), "heartbeat_ms": 14_000}
        await asyncio.to_thread(platform.cluster.deploy)

    viewers = await disturbed(platform, deploy)
    await check(platform, viewers)
    await asyncio.to_thread(
        wait_until, lambda: not before & set(ingresses(platform)), 90, 0.5, "the old ingresses to be replaced"
    )


async def test_retried_requests_with_one_key_are_one_generation_and_one_message(platform: Platform) -> None:
    await settled(platform)
    body = {"message": "[[tokens=40]]", "model": MODEL}
    headers = {"Idempotency-Key": secrets.token_hex(16)}

    async def post(client: httpx.AsyncClient) -> str:
        answer = await client.post("/api/stream-message", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.text

    async with clients(platform) as client:
        answers = await asyncio.gather(*(post(client) for _ in range(6)))
        other = await client.post("/api/stream-message", json={**body, "message": "another"}, headers=headers)
    assert len(set(answers)) == 1
    assert (other.status_code, other.json()["error"]["code"]) == (422, "INVALID_INPUT")
    opening = json.loads(answers[0].split("data: ", 1)[1].split("\n", 1)[0])
    store = await Store.open(platform.url)
    try:
        assert len(await store.list_messages(opening["conversationId"])) == 2
        assert len(await store.list_sessions(opening["conversationId"])) == 1
    finally:
        await store.close()
