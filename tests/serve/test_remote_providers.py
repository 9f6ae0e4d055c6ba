"""Remote providers on the running cluster: a stand-in for Ollama, and the /v1 of another Rotunda, on 127.0.0.1."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from tests.cluster import Cluster, wait_until
from tests.doubles import build_services
from tests.e2e.test_chat import ask, start_and_read
from tests.ollama_server import Fault, OllamaServer, StandInModel, nothing_listens
from tests.openai_servers import llama_cpp
from tests.serve.test_fleet import pids, serve_details

CUT = "This is said by a model that is far away, on a machine of its own, and it takes a while."
MODELS = (
    StandInModel("llama3:8b", reply="Hello from afar"),
    StandInModel("llava:7b", capabilities=("completion", "vision")),
    StandInModel("slow:1b", reply="word " * 300, pace_s=0.05),
    # Faults have models of their own: several in a row close the way to a model for a while.
    StandInModel("flaky:1b", reply="Hello from afar"),
    StandInModel("cut:1b", reply=CUT),
    StandInModel("once:1b", reply="Hello from afar"),
    StandInModel("anew:1b", reply="word0 word1 word2 word3 word4 word5 and so on", continues=False),
    StandInModel("other:1b", reply="word0 word1 word2 word3 word4 but then another thing", continues=False),
    StandInModel("broken:1b"),
    StandInModel("sum:1b", reply="17 + 25 = 42."),
    StandInModel("nomic:latest", capabilities=("embedding",)),
)


def upstream(provider: str, url: str, kind: str = "ollama") -> dict[str, Any]:
    """One entry of ``applications`` for a remote provider."""
    args = {"provider": provider, "kind": kind, "base_url": url}
    return {
        "name": f"upstream-{provider}",
        "route_prefix": None,
        "import_path": "deployments.upstream:build",
        "args": args,
    }


@contextmanager
def another_rotunda(home: Path) -> Iterator[str]:
    """The base URL of a platform of doubles (tests/doubles.py) that runs in a thread."""
    url: queue.Queue[str] = queue.Queue()
    loop, end = asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        platform = await build_services(home)
        url.put(await platform.serve())
        await end.wait()
        await platform.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        yield f"{url.get(timeout=30)}/v1"
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)


@pytest.fixture(scope="module")
def lab(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServer]:
    """The providers ``lab`` (the stand-in), ``other`` (another Rotunda), ``cpp`` (llama.cpp's server with tiny-chat as
    ``tiny``) and ``dead`` (nobody)."""
    home = tmp_path_factory.mktemp("other")
    with ExitStack() as stack:
        server = stack.enter_context(OllamaServer(MODELS, room=2))
        other, cpp = stack.enter_context(another_rotunda(home)), stack.enter_context(llama_cpp(home, "tiny"))
        added = [
            upstream("lab", server.url),
            upstream("other", other, "openai"),
            upstream("cpp", cpp, "openai"),
            upstream("dead", stack.enter_context(nothing_listens())),
        ]
        cluster.config["applications"] += added
        cluster.deploy()
        try:
            wait_until(lambda: provider(cluster, "lab")["status"] == "ok", 60, what="the provider to be listed")
            yield server
        finally:
            for application in added:
                cluster.config["applications"].remove(application)
            cluster.deploy()
            wait_until(lambda: provider(cluster, "lab")["status"] == "absent", 60, what="the provider to go")


def listing(cluster: Cluster) -> dict[str, Any]:
    return dict(httpx.get(f"{cluster.url}/api/models", timeout=30).json())


def provider(cluster: Cluster, name: str) -> dict[str, Any]:
    found = {each["name"]: each for each in listing(cluster)["providers"]}
    return dict(found.get(name, {"status": "absent"}))


def test_the_models_of_a_provider_are_listed_with_what_they_can_do(cluster: Cluster, lab: OllamaServer) -> None:
    model = cluster.model("lab/llava:7b")
    assert (model["provider"], model["contextLength"], "vision" in model["capabilities"]) == ("lab", 8192, True)
    assert "llama3:8b" in listing(cluster)["models"] or "lab/llama3:8b" in listing(cluster)["models"]


def test_a_provider_that_is_down_is_listed_with_its_error_and_hides_no_other(
    cluster: Cluster, lab: OllamaServer
) -> None:
    wait_until(lambda: "cannot be reached" in str(provider(cluster, "dead").get("error")), 30, what="its error")
    started = time.monotonic()
    dead = provider(cluster, "dead")
    assert time.monotonic() - started < 2
    assert (dead["status"], dead["modelCount"]) == ("error", 0)
    assert provider(cluster, "huggingface")["status"] == "ok"
    assert provider(cluster, "lab")["modelCount"] == len(MODELS)
    query = "{ availableModels { count providers { name status error modelCount } } }"
    answer = httpx.post(f"{cluster.url}/graphql", json={"query": query}, timeout=30).json()
    shown = {each["name"]: each for each in answer["data"]["availableModels"]["providers"]}
    assert (shown["dead"]["status"], shown["lab"]["status"], shown["huggingface"]["status"]) == ("error", "ok", "ok")


def test_a_reply_is_streamed_from_afar_with_trace_usage_and_residency(cluster: Cluster, lab: OllamaServer) -> None:
    reply = ask(cluster, "hi", "lab/llama3:8b")
    assert reply.text == "Hello from afar"
    session, end = reply.of("session"), reply.of("end")
    assert session["provider"] == "lab"
    assert (end["finishReason"], end["usage"]["completionTokens"]) == ("stop", 3)
    _, _, headers = next(call for call in reversed(lab.requests) if call[0] == "/api/chat")
    assert headers["traceparent"].split("-")[1] == session["traceId"]
    wait_until(lambda: cluster.model("lab/llama3:8b")["state"] == "ready", 10, what="its residency")
    assert cluster.model("lab/llama3:8b")["memoryBytes"] == 2_000_000_000


def test_the_official_openai_client_reaches_it_by_its_shortest_name(cluster: Cluster, lab: OllamaServer) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused")
    chunks = client.chat.completions.create(
        model="lab/llama3:8b", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello from afar"


def test_load_and_unload_reach_the_provider(cluster: Cluster, lab: OllamaServer) -> None:
    assert httpx.post(f"{cluster.url}/api/models/lab/llava:7b/load", timeout=30).status_code == 200
    wait_until(lambda: "llava:7b" in lab.loaded, 10, what="the load")
    wait_until(lambda: cluster.model("lab/llava:7b")["state"] == "ready", 10, what="the load to be seen")
    assert httpx.post(f"{cluster.url}/api/models/lab/llava:7b/unload", timeout=30).status_code == 200
    wait_until(lambda: "llava:7b" not in lab.loaded, 10, what="the unload")


@pytest.mark.parametrize("fault", [Fault("status", status=404, text="gone"), Fault("error", after=0, times=9)])
def test_before_the_first_byte_a_local_model_takes_over_and_the_client_is_told(
    cluster: Cluster, lab: OllamaServer, fault: Fault
) -> None:
    lab.faults.append(fault)
    try:
        reply = ask(cluster, "What is 17 + 25?", "lab/flaky:1b", fallbackModels=["rotunda/tiny-chat"])
    finally:
        lab.faults.clear()
    assert reply.text == "17 + 25 = 42."
    switched = reply.of("switched")
    assert "flaky:1b" in switched["from"] and "tiny-chat" in switched["to"]
    assert reply.names[-1] == "end"


def test_a_remote_model_takes_over_for_a_local_one(cluster: Cluster, lab: OllamaServer) -> None:
    failing = "[[error=PROVIDER_UNAVAILABLE]]"
    reply = ask(cluster, failing, "test/scripted", fallbackModels=["lab/llama3:8b"])
    assert reply.text == "Hello from afar"
    assert reply.of("switched")["to"].endswith("llama3:8b")


def test_a_model_of_a_dead_provider_gives_way_to_its_fallback_or_says_why(cluster: Cluster, lab: OllamaServer) -> None:
    reply = ask(cluster, "What is 17 + 25?", "dead/any:1b", fallbackModels=["rotunda/tiny-chat"])
    assert reply.text == "17 + 25 = 42."
    assert reply.of("switched")["from"] == "dead/any:1b"
    body = {"message": "hi", "model": "dead/any:1b"}
    answer = httpx.post(f"{cluster.url}/api/stream-message", json=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "PROVIDER_UNAVAILABLE")


@pytest.mark.parametrize(
    "fault",
    [Fault("drop", after=2), Fault("error", after=2), Fault("garbage", after=2), Fault("end", after=2)],
    ids=lambda fault: fault.kind,
)
def test_a_reply_from_afar_that_breaks_off_is_gone_on_with_unseen(
    cluster: Cluster, lab: OllamaServer, fault: Fault
) -> None:
    lab.faults.append(replace(fault, model="cut:1b"))
    reply = ask(cluster, "hi", "lab/cut:1b")
    assert reply.text == CUT
    assert reply.names[-1] == "end" and "switched" not in reply.names
    assert reply.of("end")["usage"]["completionTokens"] == len(CUT.split())
    last = lab.bodies()[-1]["messages"][-1]
    assert last == {"role": "assistant", "content": " ".join(CUT.split()[:2])}


def test_a_local_model_goes_on_where_one_from_afar_keeps_breaking_off(cluster: Cluster, lab: OllamaServer) -> None:
    lab.faults.append(Fault("drop", after=2, times=99, model="cut:1b"))
    before = len(lab.bodies())
    reply = ask(cluster, "[[tokens=20]]", "lab/cut:1b", fallbackModels=["test/scripted"])
    lab.faults.clear()
    words = 2 * (len(lab.bodies()) - before)
    assert 2 <= words <= 10
    assert reply.text == " ".join([*CUT.split()[:words], *(f"word{n}" for n in range(words, 20))])
    assert reply.names[-1] == "end" and reply.names.count("switched") == 1
    assert reply.of("end")["usage"]["completionTokens"] == 20


BREAKS = "[[tokens=40 fail_at=6 error=GENERATION_FAILED]]"
BROKEN = " ".join(f"word{n}" for n in range(6))


def test_a_model_from_afar_goes_on_where_a_local_one_broke_off(cluster: Cluster, lab: OllamaServer) -> None:
    reply = ask(cluster, BREAKS, "test/scripted", fallbackModels=["lab/cut:1b"])
    assert reply.text == " ".join([BROKEN, *CUT.split()[6:]])
    switched = reply.of("switched")
    assert (switched["from"], switched["to"], reply.names[-1]) == ("test/scripted", "cut:1b", "end")
    assert reply.of("end")["usage"]["completionTokens"] == len(CUT.split())


def test_of_a_model_that_begins_the_text_anew_the_repetition_is_dropped(cluster: Cluster, lab: OllamaServer) -> None:
    reply = ask(cluster, BREAKS, "test/scripted", fallbackModels=["lab/anew:1b"])
    assert reply.text == f"{BROKEN} and so on"
    assert reply.of("end")["usage"]["completionTokens"] == 9


def test_a_model_that_begins_another_text_is_passed_over(cluster: Cluster, lab: OllamaServer) -> None:
    reply = ask(cluster, BREAKS, "test/scripted", fallbackModels=["lab/other:1b", "lab/cut:1b"])
    assert reply.text == " ".join([BROKEN, *CUT.split()[6:]])
    assert [payload["to"] for name, payload in zip(reply.names, reply.payloads, strict=True) if name == "switched"] == [
        "cut:1b"
    ]
    alone = ask(cluster, BREAKS, "test/scripted", fallbackModels=["lab/other:1b"])
    assert (alone.text, alone.names[-1], alone.of("error")["code"]) == (BROKEN, "error", "PROVIDER_ERROR")


def test_a_break_after_the_first_byte_ends_truthfully(cluster: Cluster, lab: OllamaServer) -> None:
    lab.faults.append(Fault("drop", after=0, times=9, model="once:1b"))
    lab.faults.appendleft(Fault("drop", after=2, model="once:1b"))
    reply = ask(cluster, "hi", "lab/once:1b")
    lab.faults.clear()
    assert reply.text == "Hello from"
    assert (reply.names[-1], reply.of("error")["code"]) == ("error", "PROVIDER_ERROR")
    assert reply.of("error")["provider"] == "lab"


def test_a_model_that_keeps_failing_is_refused_at_once_for_a_while(cluster: Cluster, lab: OllamaServer) -> None:
    lab.faults.append(Fault("status", status=500, text="boom", model="broken:1b", times=100))
    body = {"message": "hi", "model": "lab/broken:1b"}

    def refused() -> httpx.Response | None:
        answer = httpx.post(f"{cluster.url}/api/stream-message", json=body, timeout=60)
        return answer if answer.status_code == 503 else None

    try:
        answer = wait_until(refused, 60, what="the breaker to open")
    finally:
        lab.faults.clear()
    assert "failed several times in a row" in answer.json()["error"]["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert ask(cluster, "hi", "lab/llama3:8b").text == "Hello from afar"


def test_a_client_that_leaves_closes_the_connection_to_the_provider(cluster: Cluster, lab: OllamaServer) -> None:
    left = lab.left
    with cluster.client() as client:
        body = {"model": "lab/slow:1b", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert any("word" in line for line in answer.iter_lines())
            assert lab.open >= 1
    wait_until(lambda: lab.left == left + 1 and lab.open == 0, 5, what="the connection to be closed")


def test_terminating_a_stream_closes_the_connection_and_keeps_the_text(cluster: Cluster, lab: OllamaServer) -> None:
    left = lab.left
    thread, reply = start_and_read(cluster, {"message": "hi", "model": "lab/slow:1b"}, tokens=5)
    session = {name: reply.of("session")[name] for name in ("sessionId", "conversationId")}
    answer = httpx.post(f"{cluster.url}/api/terminate-stream", json=session, timeout=30).json()
    assert answer["success"] and answer["partialResponse"].startswith("word word")
    thread.join(10)
    wait_until(lambda: lab.left == left + 1 and lab.open == 0, 5, what="the connection to be closed")


def test_embeddings_come_from_afar(cluster: Cluster, lab: OllamaServer) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused")
    answer = client.embeddings.create(model="lab/nomic:latest", input=["a", "abc"], encoding_format="float")
    assert [row.embedding for row in answer.data] == [[1.0, 1.0], [3.0, 1.0]]


def test_another_openai_compatible_server_is_a_provider_too(cluster: Cluster, lab: OllamaServer) -> None:
    wait_until(lambda: provider(cluster, "other")["status"] == "ok", 30, what="the other server")
    reply = ask(cluster, "[[tokens=3]]", "other/test/chat")
    assert (reply.text, reply.of("session")["provider"]) == ("word0 word1 word2", "other")
    assert reply.of("end")["usage"]["completionTokens"] == 3


SUM, GREEDY = "What is 17 + 25?", {"options": {"temperature": 0}}


def test_a_server_that_is_not_ours_answers_and_takes_over(cluster: Cluster, lab: OllamaServer) -> None:
    wait_until(lambda: provider(cluster, "cpp")["status"] == "ok", 30, what="llama.cpp")
    assert ask(cluster, SUM, "cpp/tiny", **GREEDY).text == "17 + 25 = 42."
    lab.faults.append(Fault("status", status=404, text="gone", model="sum:1b"))
    reply = ask(cluster, SUM, "lab/sum:1b", fallbackModels=["cpp/tiny"], **GREEDY)
    assert (reply.text, reply.of("switched")["from"]) == ("17 + 25 = 42.", "sum:1b")
    assert reply.of("end")["usage"]["completionTokens"] == 14


def test_a_server_that_is_not_ours_goes_on_with_what_another_began(cluster: Cluster, lab: OllamaServer) -> None:
    wait_until(lambda: provider(cluster, "cpp")["status"] == "ok", 30, what="llama.cpp")
    lab.faults.append(Fault("drop", after=1, times=99, model="sum:1b"))  # one word each time it is tried
    reply = ask(cluster, SUM, "lab/sum:1b", fallbackModels=["cpp/tiny"], **GREEDY)
    lab.faults.clear()
    assert (reply.text, reply.names[-1]) == ("17 + 25 = 42.", "end")
    assert reply.names.index("token") < reply.names.index("switched") and reply.of("switched")["to"] == "tiny"


def test_twelve_streams_at_once_from_two_providers_and_local_models_all_end_well(
    cluster: Cluster, lab: OllamaServer
) -> None:
    wanted = {"lab/llama3:8b": "Hello from afar", "huggingface/rotunda/tiny-chat": "17 + 25 = 42."}
    found: list[tuple[str, str]] = []

    def run(model: str) -> None:
        found.append((ask(cluster, "What is 17 + 25?", model).text, wanted[model]))

    threads = [threading.Thread(target=run, args=(model,)) for model in wanted for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 12
    assert all(text == expected for text, expected in found)


def test_a_provider_that_goes_and_comes_back_is_seen_both_times(cluster: Cluster, lab: OllamaServer) -> None:
    lab.stop()
    try:
        wait_until(lambda: provider(cluster, "lab")["status"] == "error", 20, what="the provider to be missed")
        shown = cluster.model("lab/llama3:8b")
        assert shown["state"] == "unavailable" and "cannot be reached" in shown["reason"]
        assert ask(cluster, "What is 17 + 25?", "huggingface/rotunda/tiny-chat").text == "17 + 25 = 42."
    finally:
        lab.start()
    wait_until(lambda: provider(cluster, "lab")["status"] == "ok", 20, what="the provider to come back")
    assert ask(cluster, "hi", "lab/llama3:8b").text == "Hello from afar"


def test_providers_and_fallbacks_of_the_platform_file_are_put_up_by_the_router(
    cluster: Cluster, lab: OllamaServer
) -> None:
    """The router reads that file when it starts, so it is killed; Serve starts another one."""
    folder = cluster.home / "configs"
    folder.mkdir(exist_ok=True)
    content = {
        "providers": [{"name": "plat", "kind": "ollama", "base_url": lab.url}],
        "fallbacks": {"plat/none:1b": ["plat/llama3:8b"], "dead/any:1b": ["plat/llama3:8b"]},
    }
    (folder / "platform.yaml").write_text(yaml.safe_dump(content))
    try:
        kill_router(cluster)
        wait_until(lambda: quietly(cluster, "plat") == "ok", 60, what="the provider of the file")
        wait_until(lambda: quietly(cluster, "lab") == "ok", 30, what="the declared provider to be known again")
        assert ask(cluster, "hi", "plat/llama3:8b").text == "Hello from afar"
        assert ask(cluster, "hi", "dead/any:1b").of("switched")["to"] == "plat/llama3:8b"
        assert "upstream-plat" in serve_details(cluster)
    finally:
        (folder / "platform.yaml").unlink()
        kill_router(cluster)
        wait_until(lambda: quietly(cluster, "lab") == "ok", 60, what="the router to come back")
    wait_until(lambda: "upstream-plat" not in serve_details(cluster), 60, what="its application to be taken down")
    assert "upstream-lab" in serve_details(cluster), "what is declared stays"
    assert quietly(cluster, "plat") == "absent"


def kill_router(cluster: Cluster) -> None:
    router = next(pid for name, pid in pids(cluster).items() if name.startswith("gateway/router"))
    os.kill(router, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(router) or psutil.Process(router).status() == "zombie", 10)


def quietly(cluster: Cluster, name: str) -> str:
    try:
        return str(provider(cluster, name)["status"])
    except (httpx.HTTPError, KeyError):
        return "unknown"
