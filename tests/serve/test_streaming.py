"""What streams must stand on the running cluster, whether they share messages (frames) or each has its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.cluster import Cluster, wait_until
from tests.e2e.test_chat import ask
from tests.serve.test_durable_streams import Viewer
from tests.serve.test_fleet import alive, pids
from tests.sse import events, text_of

REQUESTS = int(os.environ.get("ROTUNDA_SOAK_REQUESTS", "150"))
"""10,000 for the long one."""
pytestmark = pytest.mark.timeout(300 + REQUESTS // 4)
STREAMS, TOKENS = 8, 200
MESSAGE, ENDLESS = f"[[tokens={TOKENS} pace=0.02]]", "[[tokens=1000000 pace=0.02]]"
TEXT = " ".join(f"word{n}" for n in range(TOKENS))


@pytest.fixture(params=["framed", "apart"])
def model(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """A model that is in memory, whose streams share messages or do not."""
    name = f"test/{request.param}"
    assert ask(cluster, "[[tokens=1]]", name).text == "word0"
    return name


@contextlib.asynccontextmanager
async def clients(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120, limits=limits) as client:
        yield client


class Stream:
    """One reply, read as it comes."""

    def __init__(self, message: str = MESSAGE) -> None:
        self._message = message
        self.seen: list[Any] = []

    async def read(self, client: httpx.AsyncClient, model: str) -> Stream:
        body = {"message": self._message, "model": model}
        async with client.stream("POST", "/api/stream-message", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for event in events(response):
                self.seen.append(event)
        return self

    @property
    def text(self) -> str:
        return text_of(self.seen)

    @property
    def end(self) -> str | None:
        return self.seen[-1].name if self.seen else None

    @property
    def session(self) -> dict[str, Any]:
        return dict(next(event.data for event in self.seen if event.name == "session"))


async def disturbed(
    cluster: Cluster, model: str, disturb: Callable[[list[Stream]], Awaitable[None]], *messages: str
) -> list[Stream]:
    """Streams, and what happens to them when each has begun."""
    streams = [Stream(message) for message in messages or [MESSAGE] * STREAMS]
    async with clients(cluster) as client:
        reading = [asyncio.create_task(stream.read(client, model)) for stream in streams]
        async with asyncio.timeout(60):
            while min(len(stream.text) for stream in streams) == 0:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        await disturb(streams)
        await asyncio.gather(*reading)
    return streams


async def until_idle(cluster: Cluster, model: str) -> None:
    def idle() -> bool:
        shown = cluster.model(model)
        return shown["running"] == shown["waiting"] == 0

    await asyncio.to_thread(wait_until, idle, 30, 0.1, "no request to run")


async def test_a_killed_replica_loses_nothing(cluster: Cluster, model: str) -> None:
    async def kill(streams: list[Stream]) -> None:
        os.kill(next(pid for pid in cluster.model(model)["pids"] if alive(pid)), signal.SIGKILL)

    streams = await disturbed(cluster, model, kill)
    assert [stream.end for stream in streams] == ["end"] * STREAMS
    assert {stream.text for stream in streams} == {TEXT}


async def test_who_is_cancelled_takes_nobody_along(cluster: Cluster, model: str) -> None:
    async def terminate(streams: list[Stream]) -> None:
        async with clients(cluster) as client:
            for stream in streams[::2]:  # the one that leads the frames is among them
                names = ("sessionId", "conversationId")
                body = {name: stream.session[name] for name in names}
                assert (await client.post("/api/terminate-stream", json=body)).status_code == 200

    streams = await disturbed(cluster, model, terminate, *[ENDLESS, MESSAGE] * (STREAMS // 2))
    assert [stream.end for stream in streams] == ["terminated", "end"] * (STREAMS // 2)
    assert {stream.text for stream in streams[1::2]} == {TEXT}
    assert all(stream.text.startswith("word0 word1 ") for stream in streams[::2])
    await until_idle(cluster, model)


async def test_a_model_that_is_unloaded_lets_its_streams_end(cluster: Cluster, model: str) -> None:
    async def unload(streams: list[Stream]) -> None:
        async with clients(cluster) as client:
            assert (await client.post(f"/api/models/{model}/unload")).status_code == 200

    streams = await disturbed(cluster, model, unload)
    assert [stream.end for stream in streams] == ["end"] * STREAMS
    assert {stream.text for stream in streams} == {TEXT}


async def test_one_that_does_not_read_holds_up_nobody_and_is_let_go(cluster: Cluster, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "[[tokens=1000000]]"}], "stream": True}
    async with clients(cluster) as client:
        asked = client.build_request("POST", "/v1/chat/completions", json=body | {"max_tokens": 1_000_000})
        idle = await client.send(asked, stream=True)
        assert idle.status_code == 200, await idle.aread()

        async def nothing(streams: list[Stream]) -> None:
            assert cluster.model(model)["state"] == "busy"

        streams = await disturbed(cluster, model, nothing)
        await idle.aclose()
    assert {stream.text for stream in streams} == {TEXT}
    await until_idle(cluster, model)


async def test_many_requests_leave_no_call_behind(cluster: Cluster, model: str) -> None:
    """One of five leaves in the middle. A replica whose calls have all ended can leave memory at once."""
    rng, places = random.Random(3), asyncio.Semaphore(24)

    async def one(client: httpx.AsyncClient, stays: bool) -> str:
        message = {"role": "user", "content": f"[[tokens={4 if stays else 400} pace={0.001 if stays else 0.01}]]"}
        body = {"model": model, "messages": [message], "stream": True}
        async with places, client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            lines = response.aiter_lines()
            if not stays:
                return await anext(lines)
            return "\n".join([line async for line in lines])

    async with clients(cluster) as client:
        texts = await asyncio.gather(*(one(client, rng.random() > 0.2) for _ in range(REQUESTS)))
        assert all(text.startswith("data:") for text in texts)
        await until_idle(cluster, model)
        pid = next(pid for pid in cluster.model(model)["pids"] if alive(pid))
        assert (await client.post(f"/api/models/{model}/unload")).status_code == 200
    await asyncio.to_thread(wait_until, lambda: not alive(pid), 15, 0.1, "the replica's process to end")


async def test_a_killed_ingress_loses_nothing_of_who_comes_back(cluster: Cluster, model: str) -> None:
    def ingresses() -> list[int]:
        return [pid for name, pid in pids(cluster).items() if name.startswith("gateway/ingress")]

    viewers = [Viewer(cluster, MESSAGE, model=model) for _ in range(STREAMS)]
    async with clients(cluster) as client:
        watching = [asyncio.create_task(viewer.watch(client)) for viewer in viewers]
        async with asyncio.timeout(60):
            while min(len(viewer.text) for viewer in viewers) == 0:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        os.kill((await asyncio.to_thread(ingresses))[0], signal.SIGKILL)
        await asyncio.gather(*watching)
    assert [(viewer.text, viewer.faults) for viewer in viewers] == [(TEXT, [])] * STREAMS
    assert [name for viewer in viewers for name, _ in viewer.ends] == ["end"] * STREAMS
    await asyncio.to_thread(wait_until, lambda: len(ingresses()) == 2, 60, 0.5, "two ingresses")
