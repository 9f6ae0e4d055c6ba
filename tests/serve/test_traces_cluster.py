"""Every hop of every kind of reply, on a cluster that exports to a real OTLP receiver."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import MODELS, Cluster, model_application, sse_events, wait_until
from tests.e2e.test_chat import Reply
from tests.ollama_server import Fault, OllamaServer, StandInModel
from tests.otlp import Receiver
from tests.serve.test_remote_providers import upstream
from tests.spans import USAGE, Trace
from tests.unit.telemetry.test_metrics import samples

pytestmark = pytest.mark.own_cluster

CANARY = "canary-7f3a9c"
ROOT = "POST /api/stream-message"
WAY = ("request.read", "store.read", "gateway.admit", "store.write", "rotation.wait", "route.decide")
ENGINE = ("engine.queue", "prefill", "decode")
FAST, SLOW, REAL = "test/fast", "test/slow", "rotunda/tiny-chat"


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
    models = (StandInModel("flaky:1b", reply="Hello from afar"), StandInModel("rude:1b"))
    with OllamaServer(models, room=2) as ollama:
        paced = {"tokens": 30, "pace": 0.02, "ttft": 0.1, "echo": False}
        applications = [
            model_application("model-fast", model=FAST, engine="scripted", options=paced),
            model_application("model-slow", model=SLOW, engine="scripted", options={"tokens": 2000, "pace": 0.02}),
            model_application("model-tiny-chat", model=REAL),
            upstream("lab", ollama.url),
        ]
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "300"}
        made = Cluster(tmp_path_factory.mktemp("traced"), applications, environment)
        shutil.copytree(MODELS / "rotunda", made.models / "rotunda")
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
    assert len(trace.rows) <= 15
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


def _logs(cluster: Cluster) -> Path:
    """Ray's folder of logs of this very cluster, from the command line of one of its processes."""
    for process in cluster.processes():
        found = re.search(r"/\S*/session_[\d_-]+", " ".join(process.cmdline()))
        if found:
            return Path(found[0]) / "logs"
    raise AssertionError("no process names its session")
