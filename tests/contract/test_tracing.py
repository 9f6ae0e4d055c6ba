"""The spans of replies on a platform in one process: the ingress and the replicas share nothing but the carrier."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping

import httpx
import pytest

from serve_app.domain.catalog import Capability, ModelInfo
from serve_app.domain.errors import GenerationFailed
from serve_app.telemetry import semconv
from serve_app.telemetry.metrics import Totals
from serve_app.telemetry.spans import rows_of
from serve_app.telemetry.tracing import Tracing
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.spans import USAGE, Trace
from tests.unit.telemetry.test_metrics import samples

REPLY = [
    *("request.read", "store.read", "gateway.admit", "store.write", "rotation.wait", "route.decide"),
    *("chat test/chat", "attempt 1", "generate test/chat", "engine.queue", "prefill", "decode", "stream.read"),
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

    def page(self) -> dict[str, float]:
        """The figures of the ingress."""
        totals = Totals()
        totals.hear("ingress", self.platform.services.tracing.metrics.snapshot(), 0)
        return samples(totals.page(0))

    async def trace(self, id: str) -> Trace:
        """The trace, once its root has ended."""
        async with asyncio.timeout(5):
            while not any(row.root for row in self.traces().get(id, Trace([])).rows):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return self.traces()[id]


@pytest.fixture
async def make_traced(make_platform: MakePlatform) -> Callable[..., Awaitable[Traced]]:
    async def make(environ: Mapping[str, str] | None = None, **settings: object) -> Traced:
        return Traced(await make_platform(tracing=Tracing.set_up("ingress", "the-ingress", environ or {}), **settings))

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
    told = dict(re.findall(r"([\w.]+);dur=([\d.]+)", answer.headers["server-timing"]))
    assert set(told) == {"request.read", "store.read", "store.write", "gateway.admit", "rotation.wait", "route.decide"}
    read = trace.one("request.read")
    assert float(told["request.read"]) == pytest.approx((read.end_ns - read.start_ns) / 1e6, abs=5)
    assert trace.root.name == "POST /api/stream-message"
    assert trace.path("decode") == [
        *("POST /api/stream-message", "chat test/chat", "attempt 1", "generate test/chat", "decode")
    ]
    chat = trace.attributes(trace.one("chat test/chat"))
    assert (chat["gen_ai.usage.input_tokens"], chat[USAGE]) == (3, 20)
    assert (chat["gen_ai.request.temperature"], chat["gen_ai.response.finish_reasons"]) == (0.5, ["stop"])
    assert [row.name for row in trace.rows if USAGE in trace.attributes(row)] == ["chat test/chat"]
    assert trace.attributes(trace.root)["http.response.status_code"] == 200
    assert len(trace.rows) <= 17


async def test_eight_replies_at_once_keep_their_attributes_apart(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    traced = await make_traced()
    async with traced.platform.client() as client:
        answers = await asyncio.gather(
            *(
                send(client, f"[[tokens={number + 5} pace=0.01]]", options={"seed": number, "temperature": number / 10})
                for number in range(8)
            )
        )
    for number, answer in enumerate(answers):
        trace = await traced.trace(answer.headers["x-trace-id"])
        assert set(REPLY) <= set(trace.names)
        assert all(trace.parent(row) is not None for row in trace.rows if row is not trace.root)
        about = trace.attributes(trace.one("chat test/chat"))
        assert (about["gen_ai.request.seed"], about["gen_ai.request.temperature"]) == (number, number / 10)
        assert about[USAGE] == number + 5


async def test_an_error_is_the_same_on_every_span_that_it_ended(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    traced = await make_traced()
    _, trace = await broken_off(traced)
    for name in ("POST /api/stream-message", "chat test/chat", "attempt 1", "generate test/chat"):
        assert (trace.one(name).status, trace.attributes(trace.one(name))["error.type"]) == (2, "GENERATION_FAILED")


async def test_the_spans_of_a_reply_are_as_many_whatever_its_length(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    traced = await make_traced()
    names = []
    async with traced.platform.client() as client:
        for tokens in (1, 900):
            answer = await send(client, f"[[tokens={tokens} pace=0]]")
            trace = await traced.trace(answer.headers["x-trace-id"])
            assert trace.attributes(trace.one("chat test/chat"))[USAGE] == tokens
            assert not any(trace.events(row) for row in trace.rows)
            names.append(trace.names)
    assert names[0] == names[1]


async def test_vectors_have_a_span_and_figures_as_replies_have(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    vectors = ModelInfo("test/vectors", "", capabilities=frozenset({Capability.EMBEDDINGS}))
    traced = await make_traced(models=(vectors,))
    async with traced.platform.client() as client:
        body = {"model": "test/vectors", "input": ["a b", "c"], "encoding_format": "base64"}
        answer = await client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    trace = await traced.trace(answer.headers["x-trace-id"])
    # That each phase is there and in its place is to be seen here; the times of an instant are noise.
    trace.check_shape(["request.read", "gateway.admit", "rotation.wait", "attempt 1", "call", "embed test/vectors"])
    assert trace.path("engine.queue") == [
        *("POST /v1/embeddings", "embeddings test/vectors", "attempt 1", "embed test/vectors", "engine.queue")
    ]
    about = trace.attributes(trace.one("embeddings test/vectors"))
    assert (about["gen_ai.operation.name"], about["gen_ai.request.model"]) == ("embeddings", "test/vectors")
    assert (about["gen_ai.usage.input_tokens"], about["gen_ai.embeddings.dimension.count"]) == (3, 2)
    assert about["gen_ai.request.encoding_formats"] == ["base64"]
    assert USAGE not in about
    page = traced.page()
    [counted] = [name for name in page if name.startswith("gen_ai_server_request_duration_seconds_count")]
    assert "gen_ai_operation_name=embeddings" in counted and "gen_ai_response_model=test/vectors" in counted
    assert page["rotunda_tokens_total{model=test/vectors,provider=huggingface,type=input}"] == 3


async def test_vectors_that_cannot_be_made_tell_why_on_span_and_metric(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    vectors = ModelInfo("test/vectors", "", capabilities=frozenset({Capability.EMBEDDINGS}))
    traced = await make_traced(models=(vectors,))

    async def broken(*_: object) -> None:
        raise GenerationFailed("The texts could not be read.")

    traced.platform.backend.embed = broken  # type: ignore[assignment, method-assign]
    async with traced.platform.client() as client:
        answer = await client.post("/v1/embeddings", json={"model": "test/vectors", "input": "a"})
    assert answer.status_code == 502
    trace = await traced.trace(answer.headers["x-trace-id"])
    for name in ("POST /v1/embeddings", "embeddings test/vectors", "attempt 1"):
        assert (trace.one(name).status, trace.attributes(trace.one(name))["error.type"]) == (2, "GENERATION_FAILED")
    assert any("error_type=GENERATION_FAILED" in name for name in traced.page())


async def test_a_reply_that_broke_off_tells_the_tokens_that_there_were(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    traced = await make_traced()
    answer, trace = await broken_off(traced)
    [usage] = [trace.attributes(row)[USAGE] for row in trace.rows if USAGE in trace.attributes(row)]
    assert usage == answer.text.count('"token":') == 3
    page = traced.page()
    assert page["rotunda_tokens_total{model=test/chat,provider=huggingface,type=output}"] == 3
    assert not [name for name in page if "time_to_first_token" in name]


async def test_a_wait_tells_each_reason_when_it_came_and_stands_for_the_longest(
    make_traced: Callable[..., Awaitable[Traced]],
) -> None:
    traced = await make_traced()
    router = traced.platform.router
    router.hold("test/chat", 3, "router has just started")
    async with traced.platform.client() as client:
        sent = asyncio.create_task(send(client, "[[tokens=1]]"))
        await wait(lambda: len(router.asked) >= 2)
        router.hold("test/chat", 1, "memory is full")
        await asyncio.sleep(0.2)
        router.release("test/chat")
        answer = await sent
    trace = await traced.trace(answer.headers["x-trace-id"])
    waited = trace.one("rotation.wait")
    told = [event["attributes"]["rotunda.reason"] for event in trace.events(waited)]
    assert told == ["router has just started", "memory is full"]
    assert trace.attributes(waited)["rotunda.reason"] == "memory is full"


@pytest.mark.parametrize(("asked", "told"), [("span_only", True), ("TRUE", True), ("event_only", False), ("", False)])
async def test_what_was_said_stands_in_a_span_only_when_that_is_asked_for(
    make_traced: Callable[..., Awaitable[Traced]], asked: str, told: bool
) -> None:
    traced = await make_traced({semconv.CAPTURE_CONTENT: asked})
    async with traced.platform.client() as client:
        answer = await send(client, "[[tokens=2]] a secret", systemPrompt="Be brief.")
    trace = await traced.trace(answer.headers["x-trace-id"])
    assert [row.name for row in trace.rows if "secret" in row.body] == (["chat test/chat"] if told else [])
    if told:
        about = trace.attributes(trace.one("chat test/chat"))
        said = [(one["role"], one["parts"][0]["content"]) for one in json.loads(about["gen_ai.input.messages"])]
        assert said == [("system", "Be brief."), ("user", "[[tokens=2]] a secret")]
        assert json.loads(about["gen_ai.output.messages"])[0]["parts"] == [{"type": "text", "content": "word0 word1"}]


async def broken_off(traced: Traced) -> tuple[httpx.Response, Trace]:
    """A reply that fails after three tokens, and its trace."""
    async with traced.platform.client() as client:
        answer = await send(client, "[[tokens=9 fail_at=3 error=GENERATION_FAILED]]")
    return answer, await traced.trace(answer.headers["x-trace-id"])


async def wait(until: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not until():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
