"""Models come, go and die on the running cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster import MODELS, Cluster, model_application, sse_events, wait_until
from tests.e2e.test_chat import ask, start_and_read


def serve_details(cluster: Cluster) -> dict[str, Any]:
    """Serve's own view of the applications, read from its REST API as an operator would."""
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.get(f"{cluster.dashboard_url}/api/serve/applications/", headers=headers, timeout=30)
    answer.raise_for_status()
    return dict(answer.json()["applications"])


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def pids(cluster: Cluster) -> dict[str, int]:
    """The process of every running replica, by application, deployment and replica."""
    found = {}
    for name, application in serve_details(cluster).items():
        for deployment, details in application["deployments"].items():
            for replica in details["replicas"]:
                if replica["state"] == "RUNNING":
                    found[f"{name}/{deployment}/{replica['replica_id']}"] = replica["pid"]
    return found


def test_adding_a_model_application_leaves_every_other_process_alone(cluster: Cluster) -> None:
    ask(cluster, "What is 17 + 25?")
    ask(cluster, "anything", "test/scripted")
    before = pids(cluster)
    assert len(before) >= 5  # two ingresses, the router, two models
    added = model_application("model-third", model="test/third", engine="scripted", options={"tokens": 3})
    cluster.config["applications"].append(added)
    try:
        cluster.deploy()
        assert wait_until(lambda: _answers(cluster, "test/third"), what="the third model") == "word0 word1 word2"
        after = pids(cluster)
        assert {name: after.get(name) for name in before} == before
    finally:
        cluster.config["applications"].remove(added)
        cluster.deploy()
    wait_until(lambda: "model-third" not in serve_details(cluster), what="the third model to go")
    wait_until(lambda: httpx.get(f"{cluster.url}/api/models/test/third").status_code == 404, what="it to be unlisted")
    after = pids(cluster)
    assert {name: after.get(name) for name in before} == before


def _answers(cluster: Cluster, model: str) -> str:
    answer = httpx.post(
        f"{cluster.url}/v1/chat/completions",
        json={"model": model, "messages": [{"role": "user", "content": "hi"}]},
        timeout=60,
    )
    return str(answer.json()["choices"][0]["message"]["content"]) if answer.status_code == 200 else ""


def test_a_folder_dropped_into_the_store_is_listed_within_5_s_and_answers(cluster: Cluster) -> None:
    shutil.copytree(MODELS / "rotunda" / "tiny-chat", cluster.models / "acme" / "dropped")
    dropped = time.monotonic()
    shown = wait_until(lambda: _listed(cluster, "acme/dropped"), 5, what="the new model to be listed")
    assert time.monotonic() - dropped <= 5
    assert (shown["state"], shown["declared"], "chat" in shown["capabilities"]) == ("cold", False, True)
    assert ask(cluster, "What is 17 + 25?", "acme/dropped").text == "17 + 25 = 42."
    shutil.rmtree(cluster.models / "acme")
    wait_until(lambda: not _listed(cluster, "acme/dropped"), what="the model to be unlisted")
    wait_until(lambda: not [name for name in serve_details(cluster) if "acme" in name], what="its application to go")


def _listed(cluster: Cluster, model: str) -> dict[str, Any] | None:
    items = httpx.get(f"{cluster.url}/api/models", timeout=30).json()["items"]
    return next((item for item in items if item["name"] == model), None)


def test_a_bad_folder_is_listed_with_its_reason_and_refused(cluster: Cluster) -> None:
    shutil.copytree(MODELS / "rotunda" / "tiny-chat", cluster.models / "acme" / "cut")
    weights = cluster.models / "acme" / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    try:
        wait_until(lambda: _listed(cluster, "acme/cut"), 10, what="the bad folder to be listed")
        body = {"message": "hi", "model": "acme/cut"}
        answer = httpx.post(f"{cluster.url}/api/stream-message", json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "MODEL_LOAD_FAILED"), answer.text
        assert ask(cluster, "What is 17 + 25?").text == "17 + 25 = 42."
    finally:
        shutil.rmtree(cluster.models / "acme")


def test_a_reply_whose_replica_is_killed_goes_on_unseen(cluster: Cluster) -> None:
    ask(cluster, "[[tokens=1]]", "test/slow")
    message = "[[tokens=150]]"
    thread, reply = start_and_read(cluster, {"message": message, "model": "test/slow"}, tokens=10)
    victim = next(pid for pid in cluster.model("test/slow")["pids"] if alive(pid))
    os.kill(victim, signal.SIGKILL)
    thread.join(90)
    assert reply.names[-1] == "end", reply.of("error")
    assert reply.text == " ".join(f"word{n}" for n in range(150))
    assert not {"switched", "error"} & set(reply.names)
    usage = reply.of("end")["usage"]
    assert (usage["promptTokens"], usage["completionTokens"]) == (1, 150)

    query = "query($id: String!) { messages(conversationId: $id) { text sender status } }"
    body = {"query": query, "variables": {"id": reply.conversation}}
    stored = httpx.post(f"{cluster.url}/graphql", json=body, timeout=30).json()["data"]["messages"]
    assert stored == [
        {"text": message, "sender": "user", "status": "complete"},
        {"text": reply.text, "sender": "llm", "status": "complete"},
    ]
    # A replica that was killed says no farewell: it is missed when its reports stop.
    wait_until(lambda: victim not in cluster.model("test/slow")["pids"], 10, what="the killed replica to be missed")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_a_real_model_that_is_killed_says_what_it_would_have_said(cluster: Cluster, options: dict[str, Any]) -> None:
    model = "huggingface/rotunda/tiny-chat"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "min_tokens": 300,
        "max_tokens": 300,
        **options,
    }
    whole, usage = _streamed(cluster, body)
    victim = next(pid for pid in cluster.model(model)["pids"] if alive(pid))
    broken, total = _streamed(cluster, body, kill=victim, after=5)
    assert not alive(victim)
    assert broken == whole
    assert total["completion_tokens"] == usage["completion_tokens"] == 300
    assert total["prompt_tokens"] == usage["prompt_tokens"]


def _streamed(
    cluster: Cluster, body: dict[str, Any], kill: int | None = None, after: int = 0
) -> tuple[str, dict[str, Any]]:
    """Text and usage of a streamed completion; a process is killed after some chunks of it."""
    text, chunks, usage = "", 0, {}
    with cluster.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for _, _, data in sse_events(answer.iter_lines()):
            chunk = json.loads(data) if data != "[DONE]" else {}
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                text += choice["delta"].get("content") or ""
                chunks += 1
            if kill is not None and chunks == after:
                os.kill(kill, signal.SIGKILL)
    return text, usage


def test_a_model_that_fails_for_good_ends_with_the_typed_error_and_the_partial_saved(cluster: Cluster) -> None:
    """Its replica fails at the same place whenever it goes on, and nobody else can."""
    message = "[[tokens=20 fail_at=5 error=PROVIDER_UNAVAILABLE]]"
    reply = ask(cluster, message, "test/scripted")
    assert reply.text == "word0 word1 word2 word3 word4", reply.payloads
    error = reply.of("error")
    assert (error["code"], error["retryable"]) == ("PROVIDER_UNAVAILABLE", True)
    query = "query($id: String!) { messages(conversationId: $id) { text sender status } }"
    body = {"query": query, "variables": {"id": reply.conversation}}
    stored = httpx.post(f"{cluster.url}/graphql", json=body, timeout=30).json()["data"]["messages"]
    assert stored[1] == {"text": reply.text, "sender": "llm", "status": "error"}


def test_a_replica_killed_before_the_first_byte_is_not_noticed(cluster: Cluster) -> None:
    ask(cluster, "[[tokens=1]]", "test/slow")
    victim = next(pid for pid in cluster.model("test/slow")["pids"] if alive(pid))
    os.kill(victim, signal.SIGKILL)
    assert ask(cluster, "[[tokens=2]]", "test/slow").text == "word0 word1"


def test_a_model_is_unloaded_and_comes_back_on_demand(cluster: Cluster) -> None:
    ask(cluster, "anything", "test/scripted")
    gone = next(pid for pid in cluster.model("test/scripted")["pids"] if alive(pid))
    assert httpx.post(f"{cluster.url}/api/models/test/scripted/unload", timeout=30).status_code == 200
    wait_until(lambda: cluster.model("test/scripted")["state"] == "cold", what="the model to be cold")
    wait_until(lambda: not alive(gone), 10, what="its process to end")
    assert ask(cluster, "anything", "test/scripted").text == "word0 word1 word2 word3 word4 word5 word6 word7"


def test_a_pinned_model_is_not_unloaded_and_a_plan_tells_without_acting(cluster: Cluster) -> None:
    url = f"{cluster.url}/api/models/test/scripted"
    ask(cluster, "anything", "test/scripted")
    assert httpx.get(f"{url}/plan", timeout=30).json()["verdict"] == "resident"
    assert httpx.post(f"{url}/pin", timeout=30).status_code == 200
    assert cluster.model("test/scripted")["pinned"] is True
    refused = httpx.post(f"{url}/unload", timeout=30)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "INVALID_INPUT")
    assert httpx.post(f"{url}/pin", json={"pinned": False}, timeout=30).status_code == 200
    assert httpx.post(f"{url}/unload", timeout=30).status_code == 200
    wait_until(lambda: cluster.model("test/scripted")["state"] == "cold", what="the model to be cold")
    # Ray gives the resources back when the process has ended, a moment after the replica's farewell.
    wait_until(lambda: httpx.get(f"{url}/plan", timeout=30).json()["verdict"] == "fits", what="the room to be free")


def test_a_model_that_is_larger_than_every_node_never_fits(cluster: Cluster) -> None:
    added = model_application("model-huge", model="test/huge", engine="scripted", num_cpus=1000)
    cluster.config["applications"].append(added)
    try:
        cluster.deploy()
        wait_until(lambda: _listed(cluster, "test/huge"), what="the model to be listed")
        plan = httpx.get(f"{cluster.url}/api/models/test/huge/plan", timeout=30).json()
        assert plan["verdict"] == "never_fits"
    finally:
        cluster.config["applications"].remove(added)
        cluster.deploy()


def test_the_router_comes_back_and_knows_the_fleet_again(cluster: Cluster) -> None:
    ask(cluster, "anything", "test/scripted")
    before = cluster.model("test/scripted")["pids"]
    router = next(pid for name, pid in pids(cluster).items() if name.startswith("gateway/router"))
    os.kill(router, signal.SIGKILL)
    wait_until(lambda: _listed_quietly(cluster, "test/scripted").get("pids") == before, 60, what="the router's memory")
    assert ask(cluster, "anything", "test/scripted").names[-1] == "end"


def _listed_quietly(cluster: Cluster, model: str) -> dict[str, Any]:
    try:
        return _listed(cluster, model) or {}
    except (httpx.HTTPError, KeyError):
        return {}


def test_only_loopback_is_listened_on_by_what_speaks_http(cluster: Cluster) -> None:
    """The API, the replicas' HTTP ports and the dashboard; what else listens is in the README with what to firewall."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in _http_ports(cluster):
            assert connection.laddr.ip in ("127.0.0.1", "::1"), connection


def _http_ports(cluster: Cluster) -> set[int]:
    # Replicas' direct HTTP ports lie in the range that the launcher sets.
    ours = {process.pid for process in cluster.processes()}
    replicas = {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.pid in ours
        and connection.status == psutil.CONN_LISTEN
        and 20_000 <= connection.laddr.port < 30_000
    }
    assert replicas
    return replicas | {cluster.port, cluster.dashboard_port}


def doors(cluster: Cluster) -> list[str]:
    """The URL of each ingress by itself: which of them answers at the cluster's own URL is the proxy's choice."""
    ingresses = {pid for name, pid in pids(cluster).items() if name.startswith("gateway/ingress")}
    return [
        f"http://127.0.0.1:{connection.laddr.port}"
        for connection in psutil.net_connections("tcp")
        if connection.pid in ingresses
        and connection.status == psutil.CONN_LISTEN
        and 20_000 <= connection.laddr.port < 30_000
    ]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_a_foreign_host_and_a_cross_origin_post_are_refused(cluster: Cluster, headers: dict[str, str]) -> None:
    body = {"message": "hi", "model": "test/scripted"}
    answer = httpx.post(f"{cluster.url}/api/stream-message", json=body, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FORBIDDEN")
