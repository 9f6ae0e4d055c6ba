"""The spans of replies on a platform in one process: the ingress and the replicas share nothing but the carrier."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from serve_app.telemetry.spans import rows_of
from serve_app.telemetry.tracing import Tracing
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.spans import USAGE, Trace

REPLY = [
    *("request.read", "store.read", "gateway.admit", "store.write", "rotation.wait", "route.decide"),
    *("chat test/chat", "attempt 1", "generate test/chat", "engine.queue", "prefill", "decode"),
]


class Traced:
    """A platform whose spans are at hand."""

    def __init__(self, platform: LocalPlatform) -> None:
        self.platform = platform
        self.platform.backend.tracing = Tracing.set_up("model", "the-replica", {})
        self._ended: list[object] = []

    def traces(self) -> dict[str, Trace]:
        """What has ended so far, by trace id."""
        for tracing in (self.platform.services.tracing, self.platform.backend.tracing):
            self._ended += rows_of(tracing.outgoing.drain())
        ids = {row.trace_id for row in self._ended}
        return {id: Trace(row for row in self._ended if row.trace_id == id) for id in ids}

    async def trace(self, id: str) -> Trace:
        """The trace, once its root has ended."""
        async with asyncio.timeout(5):
            while not any(row.root for row in self.traces().get(id, Trace([])).rows):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return self.traces()[id]


@pytest.fixture
async def make_traced(make_platform: MakePlatform) -> Callable[..., Awaitable[Traced]]:
    async def make(**settings: object) -> Traced:
        return Traced(await make_platform(tracing=Tracing.set_up("ingress", "the-ingress", {}), **settings))

    return make


async def send(client: httpx.AsyncClient, message: str, **more: object) -> httpx.Response:
    answer = await client.post("/api/stream-message", json={"message": message, **more})
    assert answer.status_code == 200, answer.text
    return answer


async def test_a_reply_is_one_trace_with_every_phase_in_its_place(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    traced = await make_traced()
    async with traced.platform.client() as client:
        await send(client, "the first request of a process pays for what is made on demand")
        answer = await send(client, "[[tokens=20 ttft=0.02 pace=0.01]]", options={"temperature": 0.5})
    trace = await traced.trace(answer.headers["x-trace-id"])
    trace.check(REPLY)
    assert trace.root.name == "POST /api/stream-message"
    assert trace.path("decode") == [
        *("POST /api/stream-message", "chat test/chat", "attempt 1", "generate test/chat", "decode")
    ]
    chat = trace.attributes(trace.one("chat test/chat"))
    assert (chat["gen_ai.usage.input_tokens"], chat[USAGE]) == (3, 20)
    assert (chat["gen_ai.request.temperature"], chat["gen_ai.response.finish_reasons"]) == (0.5, ["stop"])
    assert [row.name for row in trace.rows if USAGE in trace.attributes(row)] == ["chat test/chat"]
    assert trace.attributes(trace.root)["http.response.status_code"] == 200
    assert len(trace.rows) <= 15
