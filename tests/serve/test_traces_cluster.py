"""Every hop of every kind of reply, on a cluster that exports to a real OTLP receiver."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from gql import Client, gql
from gql.transport.websockets import WebsocketsTransport

from serve_app.telemetry.propagation import TraceContext
from tests.cluster import MODELS, Cluster, model_application, sse_events, wait_until
from tests.e2e.test_chat import Reply
from tests.ollama_server import Fault, OllamaServer, StandInModel
from tests.otlp import Receiver
from tests.serve.test_fleet import alive, pids
from tests.serve.test_remote_providers import upstream
from tests.spans import USAGE, Trace
from tests.unit.telemetry.test_metrics import samples

pytestmark = pytest.mark.own_cluster

CANARY = "canary-7f3a9c"
ROOT = "POST /api/stream-message"
WAY = ("request.read", "store.read", "gateway.admit", "store.write", "rotation.wait", "route.decide")
ENGINE = ("engine.queue", "prefill", "decode", "stream.read")
HEARD_NS = 10**9
"""A replica hears of a cancellation a moment after the ingress has gone on."""
FAST, SLOW, REAL = "test/fast", "test/slow", "rotunda/tiny-chat"
LARGE = ("test/large-one", "test/large-two")
"""There is memory for one of them. The replica of the first exports nothing until it ends in order."""
VECTORS = "vectors:1b"
CANCELLED = "rotunda.cancelled"


class Lab:
    """A cluster, a provider beside it, the receiver, and what its clients counted."""

    def __init__(self, cluster: Cluster, receiver: Receiver, ollama: OllamaServer) -> None:
        self.cluster = cluster
        self.receiver = receiver
        self.ollama = ollama
        self.ended = 0
        self.tokens = 0
        self.statuses: dict[str, int] = {}
        self._lock = threading.Lock()

    def ask(self, message: str = "Say it", model: str = FAST, **body: Any) -> tuple[str, Reply]:
        """The trace's id and the whole reply; every message and every echo hold the canary."""
        payload = {"message": f"{message} {CANARY}", "model": model, **body}
        with (
            self.cluster.client() as client,
            client.stream("POST", "/api/stream-message", json=payload) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            reply = Reply(list(sse_events(answer.iter_lines())))
            self.count(reply)
            return answer.headers["x-trace-id"], reply

    def count(self, reply: Reply) -> None:
        with self._lock:
            self.ended += 1
            status = {"end": "completed", "terminated": "terminated", "error": "error"}[reply.names[-1]]
            self.statuses[status] = self.statuses.get(status, 0) + 1
            if status == "completed":
                self.tokens += reply.of("end")["usage"]["completionTokens"]
            elif status == "terminated":
                self.tokens += reply.of("terminated")["tokenCount"]
            else:
                self.tokens += len(reply.text.split())  # a word a token

    def trace(self, id: str, *names: str) -> Trace:
        """The trace, once its root and these spans have come."""

        def whole() -> Trace | None:
            trace = self.receiver.trace(id)
            return trace if set(names) <= set(trace.names) and any(row.root for row in trace.rows) else None

        return wait_until(whole, 30, what=f"{names} of {id}: {self.receiver.trace(id)}")

    def page(self) -> dict[str, float]:
        answer = httpx.get(f"{self.cluster.url}/metrics", timeout=30)
        assert answer.status_code == 200, answer.text
        return samples(answer.content)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    receiver = Receiver()
    # Faults have models of their own: several in a row close the way to a model for a while.
    models = (
        StandInModel("flaky:1b", reply="Hello from afar"),
        StandInModel("rude:1b"),
        StandInModel("slow:1b", reply="word " * 300, pace_s=0.02),
        StandInModel("vectors:1b", capabilities=("embedding",)),
    )
    with OllamaServer(models, room=2) as ollama:
        paced = {"tokens": 30, "pace": 0.02, "ttft": 0.1, "echo": False}
        applications = [
            model_application("model-fast", model=FAST, engine="scripted", options=paced),
            model_application("model-slow", model=SLOW, engine="scripted", options={"tokens": 2000, "pace": 0.02}),
            model_application("model-tiny-chat", model=REAL),
            *(
                model_application(f"model-{name[5:]}", model=name, engine="scripted", options=paced, memory_bytes="1GB")
                for name in LARGE
            ),
            upstream("lab", ollama.url),
        ]
        never = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}
        next(one for one in applications if one["name"] == "model-large-one")["runtime_env"] = {"env_vars": never}
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "300"}
        made = Cluster(tmp_path_factory.mktemp("traced"), applications, environment)
        shutil.copytree(MODELS / "rotunda", made.models / "rotunda")
        (made.home / "configs").mkdir()
        (made.home / "configs" / "platform.yaml").write_text("capacity: {memory_bytes: 1800MB}\n")
        try:
            made.start()
            wait_until(lambda: httpx.get(f"{made.url}/ready", timeout=30).status_code == 200, 60, what="/ready")
            listed = lambda: "flaky:1b" in str(httpx.get(f"{made.url}/api/models", timeout=30).json())  # noqa: E731
            wait_until(listed, 60, what="the provider to be listed")
            yield Lab(made, receiver, ollama)
        finally:
            made.stop()
            receiver.close()


def usage_spans(trace: Trace) -> list[str]:
    return [row.name for row in trace.rows if USAGE in trace.attributes(row)]


def test_a_cold_reply_shows_the_load_that_it_waited_for(lab: Lab) -> None:
    id, reply = lab.ask("What is 17 + 25?", REAL)
    assert reply.names[-1] == "end"
    trace = lab.trace(id, *WAY, *ENGINE, f"chat {REAL}")
    trace.check([*WAY, *ENGINE, f"chat {REAL}", f"generate {REAL}"])
    assert usage_spans(trace) == [f"chat {REAL}"]
    load_id, load_span = trace.links(trace.root)["load"]
    assert load_id != id
    load = lab.trace(load_id, "model.import", "model.weights", "model.warmup")
    load.check(["model.permit", "model.find"])
    assert (load.root.name, load.root.span_id) == (f"model.load {REAL}", load_span)


def test_cold_replies_that_evicted_another_model_name_it_and_the_load_that_they_share(lab: Lab) -> None:
    leaves, comes = LARGE
    flushed, reply = lab.ask(model=leaves)
    assert reply.names[-1] == "end"
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: lab.ask(model=comes), range(2)))
    loads = set()
    for id, reply in replies:
        assert reply.names[-1] == "end"
        assert any(leaves in payload.get("evicting", ()) for payload in reply.payloads)
        trace = lab.trace(id, *WAY, *ENGINE)
        trace.check([*WAY, *ENGINE])
        assert usage_spans(trace) == [f"chat {comes}"]
        wait = trace.one("rotation.wait")
        assert trace.attributes(wait)["rotunda.evicting"] == [leaves]
        assert trace.events(wait) and trace.attributes(wait)["rotunda.reason"]
        loads.add(trace.links(trace.root)["load"])
    [(load_id, load_span)] = loads
    load = lab.trace(load_id, "model.import", "model.weights")
    load.check(["model.permit", "model.find"])
    assert (load.root.name, load.root.span_id) == (f"model.load {comes}", load_span)
    # What the replies waited for is the eviction and this load, which lies within the wait.
    assert wait.start_ns < load.root.start_ns < load.root.end_ns <= wait.end_ns
    evicted = f"rotunda_evictions_total{{model={leaves},reason=room}}"
    assert wait_until(lambda: lab.page().get(evicted), 20, what="the eviction to be counted") == 1
    # The one that left has flushed its spans as it ended.
    trace = lab.trace(flushed, *WAY, *ENGINE)
    trace.check([*WAY, *ENGINE])


def test_a_warm_reply_is_one_tree(lab: Lab) -> None:
    lab.ask()
    id, reply = lab.ask()
    trace = lab.trace(id, *WAY, *ENGINE)
    trace.check([*WAY, *ENGINE])
    assert trace.path("decode") == [ROOT, f"chat {FAST}", "attempt 1", f"generate {FAST}", "decode"]
    assert usage_spans(trace) == [f"chat {FAST}"]
    assert trace.attributes(trace.one(f"chat {FAST}"))[USAGE] == reply.of("end")["usage"]["completionTokens"] == 30
    assert "load" not in trace.links(trace.root)
    assert reply.of("session")["traceId"] == id
    assert len(trace.rows) <= 17
    processes = {json.loads(row.body)["resource"]["rotunda.role"] for row in trace.rows}
    assert processes == {"ingress", "model"}


def test_a_reply_that_fell_back_across_providers_shows_every_attempt(lab: Lab) -> None:
    lab.ask()
    lab.ollama.faults.append(Fault("status", status=503, text="no", model="flaky:1b", times=4))
    id, reply = lab.ask(model="lab/flaky:1b", fallbackModels=[FAST])
    assert "switched" in reply.names and reply.names[-1] == "end"
    trace = lab.trace(id, *WAY, *ENGINE)
    trace.check([*WAY, *ENGINE, "upstream.wait"])
    [chat] = usage_spans(trace)
    about = trace.attributes(trace.one(chat))
    assert (about["gen_ai.response.model"], about["gen_ai.provider.name"]) == (FAST, "huggingface")
    attempts = [row for row in trace.rows if row.name.startswith("attempt ")]
    assert [row.status for row in attempts] == [2] * (len(attempts) - 1) + [0]
    for before, after in itertools.pairwise(attempts):
        assert trace.links(after)["retried"] == (id, before.span_id)
    sent = [headers["traceparent"] for path, _, headers in lab.ollama.requests if path == "/api/chat"]
    assert sent[-1].split("-")[1] == id
    assert sent[-1].split("-")[2] in {row.span_id for row in trace.rows if row.name.startswith("generate")}


def part_of(lab: Lab, words: int, model: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """Read so many tokens of a reply and leave; the trace and the ``session`` event."""
    body = {"message": f"Go on {CANARY}", "model": model, **more}
    with lab.cluster.client() as client, client.stream("POST", "/api/stream-message", json=body) as answer:
        seen: list[tuple[str | None, str | None, str]] = []
        for event in sse_events(answer.iter_lines()):
            seen.append(event)
            if Reply(seen).names.count("token") == words:
                break
        return answer.headers["x-trace-id"], Reply(seen).of("session")


def follow(lab: Lab, session: str, after: int = 0) -> tuple[str, Reply]:
    """Come back to a reply, and read it to its end."""
    with lab.cluster.client(headers={"Last-Event-ID": str(after)}) as client:
        answer = client.get(f"/api/stream-message/{session}")
    assert answer.status_code == 200, answer.text
    return answer.headers["x-trace-id"], Reply(list(sse_events(iter([*answer.text.splitlines(), ""]))))


@pytest.mark.parametrize("model", [SLOW, "slow:1b"])
def test_a_terminated_reply_is_marked_and_whole(lab: Lab, model: str) -> None:
    seen: list[tuple[str | None, str | None, str]] = []
    body = {"message": f"Go on {CANARY}", "model": model}
    with lab.cluster.client() as client, client.stream("POST", "/api/stream-message", json=body) as answer:
        for event in sse_events(answer.iter_lines()):
            seen.append(event)
            if Reply(seen).names.count("token") == 40:
                opened = Reply(seen).of("session")
                told = {"sessionId": opened["sessionId"], "conversationId": opened["conversationId"]}
                assert lab.cluster.client().post("/api/terminate-stream", json=told).json()["success"]
    reply = Reply(seen)
    lab.count(reply)
    engine = ENGINE if model == SLOW else ("upstream.wait", "upstream.stream", "stream.read")
    trace = lab.trace(answer.headers["x-trace-id"], *WAY, *engine)
    trace.check([*WAY, *engine], slack_ns=HEARD_NS)
    root = trace.attributes(trace.root)
    assert (root["rotunda.session.status"], root["rotunda.termination.reason"]) == ("terminated", "USER_REQUESTED")
    marked = [row.name for row in trace.rows if trace.attributes(row).get(CANCELLED)]
    assert {trace.root.name, f"chat {model}", "attempt 1", f"generate {model}"} <= set(marked)
    assert {row.status for row in trace.rows} == {0}
    assert usage_spans(trace) == [f"chat {model}"]
    tokens = reply.of("terminated")["tokenCount"]
    assert trace.attributes(trace.one(f"chat {model}"))[USAGE] == tokens >= 40


def test_a_reply_whose_client_left_lasts_until_its_end(lab: Lab) -> None:
    id, session = part_of(lab, 30, SLOW, onDisconnect="cancel")
    trace = lab.trace(id, *WAY, *ENGINE)
    _, ended = follow(lab, session["sessionId"])
    lab.count(ended)
    trace.check([*WAY, *ENGINE], slack_ns=HEARD_NS)
    about = trace.attributes(trace.root)
    assert about["rotunda.session.status"] == "terminated"
    assert about["rotunda.termination.reason"] == "CLIENT_DISCONNECTED"
    for name in (ROOT, f"chat {SLOW}", "attempt 1", f"generate {SLOW}"):
        assert trace.attributes(trace.one(name))[CANCELLED] is True, name
    assert usage_spans(trace) == [f"chat {SLOW}"]
    assert trace.attributes(trace.one(f"chat {SLOW}"))[USAGE] == ended.of("terminated")["tokenCount"]


def test_a_resumed_reply_is_two_traces_linked(lab: Lab) -> None:
    id, session = part_of(lab, 10, SLOW, message=f"[[tokens=120]] {CANARY}")
    resumed, rest = follow(lab, session["sessionId"], after=5)
    assert (rest.ids[0], rest.names[-1]) == (6, "end")
    lab.count(rest)
    first = lab.trace(id, *WAY, *ENGINE)
    first.check([*WAY, *ENGINE])
    assert first.attributes(first.root)["rotunda.session.status"] == "completed"
    assert usage_spans(first) == [f"chat {SLOW}"]
    second = lab.trace(resumed, "stream.follow")
    second.check(["store.read", "stream.follow"])
    assert second.root.name == "GET /api/stream-message/{session_id}"
    assert usage_spans(second) == []
    assert second.links(second.root)["session"] == (first.root.trace_id, first.one(f"chat {SLOW}").span_id)


def test_each_subscription_of_a_websocket_is_a_trace_of_its_own(lab: Lab) -> None:
    create = (
        'mutation { createConversation(input: {id: "subscribed", tabName: "t", llmModel: "test/fast"}) { message } }'
    )
    answer = httpx.post(f"{lab.cluster.url}/graphql", json={"query": create}, timeout=30).json()
    assert "errors" not in answer, answer
    document = gql(
        """subscription Go($input: MessageInput!) { streamMessage(input: $input) {
        __typename seq ... on SessionEvent { traceId } ... on EndEvent { usage { completionTokens } } } }"""
    )

    async def subscribe() -> list[list[dict[str, Any]]]:
        transport = WebsocketsTransport(
            url=f"ws{lab.cluster.url[4:]}/graphql",
            subprotocols=[WebsocketsTransport.GRAPHQLWS_SUBPROTOCOL],
        )
        async with Client(transport=transport) as session:
            seen = []
            for _ in range(2):
                variables = {"input": {"conversationId": "subscribed", "message": f"Go {CANARY}"}}
                document.variable_values = variables
                seen.append([event["streamMessage"] async for event in session.subscribe(document)])
            return seen

    replies = asyncio.run(subscribe())
    ids = []
    for events in replies:
        assert events[-1]["__typename"] == "EndEvent"
        lab.ended += 1
        lab.statuses["completed"] = lab.statuses.get("completed", 0) + 1
        lab.tokens += events[-1]["usage"]["completionTokens"]
        ids.append(next(event["traceId"] for event in events if event["__typename"] == "SessionEvent"))
        trace = lab.trace(ids[-1], *WAY, *ENGINE)
        trace.check([*WAY, *ENGINE])
        assert trace.root.name == "WS /graphql"
        assert usage_spans(trace) == [f"chat {FAST}"]
    assert len(set(ids)) == 2


def test_eight_replies_at_once_keep_their_attributes_apart(lab: Lab) -> None:
    def one(number: int) -> tuple[int, str, Reply]:
        id, reply = lab.ask(f"[[tokens={number + 30} pace=0.05]]", options={"temperature": number / 10, "seed": number})
        return number, id, reply

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(one, range(8)))
    assert len({id for _, id, _ in replies}) == 8
    for number, id, _ in replies:
        trace = lab.trace(id, *WAY, *ENGINE)
        trace.check_shape([*WAY, *ENGINE])
        about = trace.attributes(trace.one(f"chat {FAST}"))
        assert (about["gen_ai.request.seed"], about["gen_ai.request.temperature"]) == (number, number / 10)
        assert about[USAGE] == number + 30


def test_an_error_is_the_same_on_the_span_and_on_the_metric(lab: Lab) -> None:
    id, reply = lab.ask("[[tokens=60 fail_at=50 error=GENERATION_FAILED]]")
    assert reply.names[-1] == "error"
    trace = lab.trace(id, *WAY, *ENGINE)
    trace.check([*WAY, *ENGINE])
    for name in (ROOT, f"chat {FAST}", f"generate {FAST}"):
        assert trace.one(name).status == 2, name
        assert trace.attributes(trace.one(name))["error.type"] == "GENERATION_FAILED"

    def counted() -> list[float]:
        return [
            value
            for name, value in lab.page().items()
            if name.startswith("gen_ai_server_request_duration_seconds_count{") and "=GENERATION_FAILED" in name
        ]

    assert wait_until(counted, 20, what="the error to be counted") == [1.0]


def test_the_counters_add_up_to_what_the_clients_counted(lab: Lab) -> None:
    for _ in range(3):
        lab.ask("[[tokens=7]]")

    def told() -> tuple[float, float, dict[str, float]]:
        page = lab.page()
        ended = sum(
            value for name, value in page.items() if name.startswith("gen_ai_server_request_duration_seconds_c")
        )
        tokens = sum(value for name, value in page.items() if re.match(r"rotunda_tokens_total\{.*type=output", name))
        statuses: dict[str, float] = {}
        for name, value in page.items():
            if found := re.match(r"rotunda_sessions_total\{.*status=(\w+)", name):
                statuses[found[1]] = statuses.get(found[1], 0) + value
        return ended, tokens, statuses

    wanted = (lab.ended, lab.tokens, lab.statuses)
    wait_until(lambda: told() == wanted, 20, what=f"{wanted}; first told: {told()}")
    page = lab.page()
    assert page[f"rotunda_loads_total{{model={REAL},outcome=ok}}"] == 1
    assert any(name.startswith("rotunda_replica_memory_bytes") and value > 2e7 for name, value in page.items())
    assert any(name.startswith("rotunda_node_memory_free_bytes") and value > 0 for name, value in page.items())
    assert page["rotunda_memory_threshold_ratio{level=critical}"] == 0.95


def test_vectors_have_a_trace_and_the_provider_hears_of_it(lab: Lab) -> None:
    answer = httpx.post(
        f"{lab.cluster.url}/v1/embeddings", json={"model": f"lab/{VECTORS}", "input": ["a b", CANARY]}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    lab.ended += 1
    id = answer.headers["x-trace-id"]
    trace = lab.trace(id, f"embed {VECTORS}")
    trace.check_shape(["request.read", "gateway.admit", "rotation.wait", "attempt 1", "call", "upstream.wait"])
    about = trace.attributes(trace.one(f"embeddings {VECTORS}"))
    assert about["gen_ai.provider.name"] == "lab"
    assert about["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"] == 2
    [sent] = [headers["traceparent"] for path, _, headers in lab.ollama.requests if path == "/api/embed"]
    assert sent.split("-")[1:3] == [id, trace.one(f"embed {VECTORS}").span_id]


def test_spans_that_go_with_a_killed_replica_are_counted(lab: Lab) -> None:
    id, reply = lab.ask(model=LARGE[0])
    assert reply.names[-1] == "end"
    trace = lab.trace(id, "route.decide", f"chat {LARGE[0]}")
    # Its load (5 spans) and this reply's part in it (5) have ended and were not exported.
    wait_until(lambda: lab.page()["rotunda_spans_unsent{role=model}"] == 10, 30, what="the spans to be reported")
    victim = next(pid for name, pid in pids(lab.cluster).items() if name.startswith("model-large-one/"))
    os.kill(victim, signal.SIGKILL)
    lost = "rotunda_spans_lost_total{reason=killed}"
    assert wait_until(lambda: lab.page().get(lost), 60, what="the spans to be missed") == 10
    assert not {"call", "engine.queue", "prefill", "decode"} & set(lab.receiver.trace(trace.root.trace_id).names)


def test_no_word_of_a_prompt_or_reply_is_told_to_anybody(lab: Lab) -> None:
    marker = f"{CANARY}-{uuid.uuid4().hex}"
    lab.ask(f"[[echo=true tokens=20]] {marker}")
    lab.ask(f"[[error=GENERATION_FAILED fail_at=2]] {marker}")
    httpx.post(f"{lab.cluster.url}/api/stream-message", json={"message": marker, "options": 5}, timeout=30)
    httpx.post(f"{lab.cluster.url}/v1/chat/completions", json={"model": FAST, "messages": marker}, timeout=30)
    lab.ollama.faults.append(Fault("status", status=500, text=f"I cannot answer {marker}", model="rude:1b", times=4))
    lab.ask(marker, "lab/rude:1b", fallbackModels=[FAST])
    time.sleep(1)  # what is on its way to a file or to the receiver has arrived
    assert CANARY.encode() not in lab.receiver.bytes
    assert CANARY not in httpx.get(f"{lab.cluster.url}/metrics", timeout=30).text
    files = [path for path in _logs(lab.cluster).rglob("*") if path.is_file()]
    assert any("replica_gateway" in path.name for path in files)
    assert not [path.name for path in files if CANARY.encode() in path.read_bytes()]
    assert not lab.receiver.refused


def test_log_records_are_json_and_name_what_they_are_about(lab: Lab) -> None:
    id, _ = lab.ask("[[error=GENERATION_FAILED]]", fallbackModels=[REAL])

    def found() -> dict[str, Any] | None:
        for path in _logs(lab.cluster).rglob("replica_gateway_ingress*"):
            for line in path.read_text().splitlines():
                if id in line and "attempt" in line and line.startswith("{"):
                    return dict(json.loads(line))
        return None

    record = wait_until(found, 20, what="a record of the attempt")
    assert (record["trace_id"], record["model"], record["provider"]) == (id, FAST, "huggingface")
    assert len(record["session"]) == 32


def test_a_callers_sampled_flag_means_nothing_from_a_stranger(lab: Lab) -> None:
    given = TraceContext(uuid.uuid4().hex, "ab" * 8, sampled=False)
    id = ask_within(lab, given)
    trace = lab.trace(id, *WAY, *ENGINE)
    assert id != given.trace_id
    assert trace.links(trace.root)["caller"] == (given.trace_id, given.span_id)


def test_at_a_ratio_exactly_the_expected_traces_are_exported_each_whole(lab: Lab) -> None:
    set_up_gateway(lab, OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.1", TRUST_TRACEPARENT="true")
    ids = [f"{'ab' * 8}{number * 2**64 // 40 + 2**52:016x}" for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(lambda id: ask_within(lab, TraceContext(id, "ab" * 8)), ids))
    assert asked == ids
    wanted = [id for id in ids if int(id[16:], 16) < 0.1 * 2**64]
    assert len(wanted) == 4
    for id in wanted:
        trace = lab.trace(id, *WAY, *ENGINE)
        trace.check_shape([*WAY, *ENGINE, f"chat {FAST}", "attempt 1", f"generate {FAST}"])
        assert trace.root.parent_id == "ab" * 8
    assert lab.receiver.ids() & set(ids) == set(wanted)


def test_at_none_only_a_trusted_callers_flag_has_a_trace_exported(lab: Lab) -> None:
    set_up_gateway(
        lab, OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="0", TRUST_TRACEPARENT="true"
    )
    unwanted = [ask_within(lab, TraceContext(uuid.uuid4().hex, "ab" * 8, sampled=False)), ask_within(lab, None)]
    unwanted += [lab.ask()[0] for _ in range(5)]
    flagged = TraceContext(uuid.uuid4().hex, "ab" * 8, sampled=True)
    assert ask_within(lab, flagged) == flagged.trace_id
    # It was asked for last: what had been recorded before it has been exported by now, too.
    lab.trace(flagged.trace_id, *WAY, *ENGINE)
    assert not lab.receiver.ids() & set(unwanted)


def ask_within(lab: Lab, given: TraceContext | None) -> str:
    """A short reply for a caller who tells of its own trace; the id that the answer names."""
    headers = given.carrier() if given else {}
    with lab.cluster.client(headers=headers) as client:
        answer = client.post("/api/stream-message", json={"message": f"[[tokens=2]] {CANARY}", "model": FAST})
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-trace-id"])


def set_up_gateway(lab: Lab, **variables: str) -> None:
    """Give the gateway an environment of its own, and return once only replicas that have it are left."""

    def gateway() -> set[int]:
        return {pid for name, pid in pids(lab.cluster).items() if name.startswith("gateway/")}

    def ready() -> bool:
        now = gateway()
        settled = len(now) == 3 and not now & before and not any(map(alive, before))
        return settled and httpx.get(f"{lab.cluster.url}/ready", timeout=30).status_code == 200

    before = gateway()
    lab.cluster.config["applications"][0]["runtime_env"] = {"env_vars": variables}
    lab.cluster.deploy()
    wait_until(ready, 240, what=f"the gateway with {variables}")


def _logs(cluster: Cluster) -> Path:
    """Ray's folder of logs of this very cluster, from the command line of one of its processes."""
    for process in cluster.processes():
        found = re.search(r"/\S*/session_[\d_-]+", " ".join(process.cmdline()))
        if found:
            return Path(found[0]) / "logs"
    raise AssertionError("no process names its session")
