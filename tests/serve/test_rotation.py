"""The rotation on a running cluster: real models and scripted ones, and room for one at a time."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.cluster import MODELS, Cluster, wait_until
from tests.e2e.test_chat import ask
from tests.ollama_server import OllamaServer, StandInModel
from tests.rotation import Asked, rotation, scripted, with_platform
from tests.serve.test_fleet import pids
from tests.serve.test_remote_providers import upstream

pytestmark = pytest.mark.own_cluster

FAR = ("far-b:1b", "far-c:1b")
REAL = ("acme/one", "acme/two", "acme/three")


@pytest.fixture(scope="module")
def ollama() -> Iterator[OllamaServer]:
    """The stand-in, with more room than the platform lets it fill."""
    with OllamaServer(tuple(StandInModel(name) for name in FAR), room=5) as server:
        yield server


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, ollama: OllamaServer) -> Iterator[Cluster]:
    """Three real models that were discovered and three scripted ones, with memory for one of them; two at Ollama; and
    no more than two models in all."""
    home = tmp_path_factory.mktemp("tight")
    models = [scripted(name, memory_bytes="500MB", options={"pace": 0.02}) for name in "abc"]
    far = upstream("lab", ollama.url)
    far["args"] |= {"budget_bytes": "4GB"}
    platform = {"capacity": {"memory_bytes": "700MB"}}
    settings = {"ROTATION_TIMEOUT_MS": "30000", "MAX_CONCURRENT_MODELS": "2"}
    cluster = with_platform(home, [*models, far], platform, **settings)
    for name in REAL:
        shutil.copytree(MODELS / "rotunda" / "tiny-chat", cluster.models / name)
    with cluster.running():
        yield cluster


def test_twelve_clients_at_once_get_all_of_three_models_with_room_for_one(tight: Cluster) -> None:
    asked = [Asked(tight, REAL[n % 3], "What is 17 + 25?") for n in range(12)]
    assert {one.text() for one in asked} == {"17 + 25 = 42."}
    seen = rotation(tight)
    assert all(node["used"]["memoryBytes"] <= node["total"]["memoryBytes"] for node in seen["nodes"])
    loads = [line["model"] for line in seen["history"] if line["action"] == "load"]
    assert sorted(set(loads)) == sorted(REAL) and len(loads) <= 5  # requests for one model are granted together
    news = [
        payload for one in asked for payload in one.result().payloads if "position" in payload or "evicting" in payload
    ]
    assert any(payload.get("position", 0) >= 1 and payload["reason"] for payload in news)
    assert any(payload.get("evicting") for payload in news)


def test_who_asks_with_priority_is_served_first(tight: Cluster) -> None:
    ask(tight, "[[tokens=1]]", "test/a")
    running = Asked(tight, "test/a", "[[tokens=250]]").begun()
    low = Asked(tight, "test/b", priority="low")
    wait_until(lambda: len(rotation(tight)["queue"]) == 1, what="the first to wait")
    high = Asked(tight, "test/c", priority="high")
    shown = wait_until(lambda: len(queue := rotation(tight)["queue"]) == 2 and queue, what="the second to wait")
    assert [(one["position"], one["model"], one["priority"]) for one in shown] == [
        (1, "test/c", "high"),
        (2, "test/b", "low"),
    ]
    assert len(running.text().split()) == 250
    assert high.text() and low.text()
    assert high.ended < low.ended


def test_the_death_of_the_router_loses_no_stream_and_no_request(tight: Cluster) -> None:
    ask(tight, "[[tokens=1]]", "test/a")
    running = Asked(tight, "test/a", "[[tokens=400]]").begun()
    waiting = [Asked(tight, f"test/{name}") for name in "bcbc"]
    wait_until(lambda: len(rotation(tight)["queue"]) == 4, what="all four to wait")
    router = next(pid for name, pid in pids(tight).items() if name.startswith("gateway/router"))
    os.kill(router, signal.SIGKILL)
    assert len(running.text().split()) == 400
    assert [one.text() for one in waiting] == ["word0 word1 word2"] * 4
    assert {line["model"] for line in rotation(tight)["history"] if line["action"] == "load"} >= {"test/b", "test/c"}


def test_a_local_model_and_two_at_ollama_take_turns_with_room_for_two(tight: Cluster, ollama: OllamaServer) -> None:
    names = ("test/a", *(f"lab/{far}" for far in FAR))
    wait_until(lambda: set(FAR) <= set(usable(tight)), 60, what="Ollama")
    for name in (*names, *names):
        assert ask(tight, "[[tokens=1]]", name).names[-1] == "end"
    most: list[int] = []
    crowds: list[Any] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            residents, loaded = rotation(tight)["residents"], list(ollama.loaded)
            most.append(max(len(residents), len(loaded)))
            if most[-1] > 2:
                crowds.append((residents, loaded))

    watching = threading.Thread(target=watch)
    watching.start()
    asked = [Asked(tight, names[n % 3], "[[tokens=1]]") for n in range(12)]
    try:
        assert all(one.text() for one in asked)
    finally:
        stop.set()
        watching.join()
    assert max(most) == 2, (crowds[0], rotation(tight)["history"])
    evictions = [line for line in rotation(tight)["history"] if line["action"] == "evict"]
    evicted = {victim.removeprefix("huggingface/") for line in evictions for victim in line["victims"]}
    assert "test/a" in evicted and evicted & {*FAR, *(f"lab/{far}" for far in FAR)}
    assert [body for body in ollama.bodies("/api/chat") if body.get("keep_alive") == 0]  # told to let go of one


def usable(cluster: Cluster) -> list[str]:
    items = httpx.get(f"{cluster.url}/api/models", timeout=30).json()["items"]
    return [item["id"] for item in items if item["state"] != "unavailable"]


def test_a_pin_and_the_pool_outlive_the_router(tight: Cluster) -> None:
    ask(tight, "[[tokens=1]]", "test/a")
    assert httpx.post(f"{tight.url}/api/models/test/a/pin", timeout=30).status_code == 200
    changed = httpx.post(f"{tight.url}/api/rotation", json={"remove": ["test/c"]}, timeout=30)
    assert changed.status_code == 200, changed.text
    wait_until(lambda: httpx.get(f"{tight.url}/api/models/test/c", timeout=30).status_code == 404, what="c to be out")
    time.sleep(3)  # what is learned is written every two seconds
    router = next(pid for name, pid in pids(tight).items() if name.startswith("gateway/router"))
    os.kill(router, signal.SIGKILL)
    try:
        wait_until(lambda: _quietly(lambda: tight.model("test/a")["pinned"]), 60, what="the pin")
        assert httpx.get(f"{tight.url}/api/models/test/c", timeout=30).status_code == 404
        refused = httpx.post(f"{tight.url}/api/stream-message", json={"message": "hi", "model": "test/b"}, timeout=60)
        assert "MEMORY_EXCEEDED" in refused.text  # a pinned model holds the room: no wait would help
    finally:
        httpx.post(f"{tight.url}/api/models/test/a/pin", json={"pinned": False}, timeout=30)
        httpx.post(f"{tight.url}/api/rotation", json={"add": ["test/c"]}, timeout=30)
    assert ask(tight, "hi", "test/c").names[-1] == "end"


def _quietly(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except (httpx.HTTPError, KeyError):
        return None
