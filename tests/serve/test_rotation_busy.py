"""The rotation when the models are busy: short waits, steady load, and loads that fail."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.cluster import Cluster, wait_until
from tests.e2e.test_chat import ask
from tests.rotation import Asked, decisions, rotation, scripted, state, with_platform
from tests.serve.test_fleet import alive, serve_details

pytestmark = pytest.mark.own_cluster

MAX_WAIT_S, MIN_RESIDENCY_S = 3.0, 10.0
SLACK_S = 2.0
"""How much later than at once the router may act: it looks every half second, and shares the machine."""
WATCHED = ("load", "queued", "revoke", "drain", "gone", "ready")


@pytest.fixture(scope="module")
def brisk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Scripted models with room for one, and little patience with busy ones.

    What waits here while models change places, and comes to one at once when it is back, is a pace times the seconds
    that a load takes on this machine: both lines have room for all that a test sends.
    """
    home = tmp_path_factory.mktemp("brisk")
    models = [scripted(name, memory_bytes="500MB", max_queue=1000, options={"pace": 0.02}) for name in "ab"]
    models.append(scripted("slow-load", memory_bytes="500MB", options={"load_s": 6}))
    models.append(scripted("broken", memory_bytes="500MB", options={"load_error": "MODEL_LOAD_FAILED"}))
    platform = {"capacity": {"memory_bytes": "700MB"}, "fallbacks": {"test/broken": ["test/a"]}}
    cluster = with_platform(home, models, platform, ROTATION_TIMEOUT_MS="3000", MAX_QUEUE_SIZE="1000")
    with cluster.running():
        yield cluster


def test_a_stream_that_runs_when_its_model_must_go_completes(brisk: Cluster) -> None:
    ask(brisk, "[[tokens=1]]", "test/a")
    running = Asked(brisk, "test/a", "[[tokens=700]]").begun()
    # It must have stayed its least time before it can be asked to drain.
    waiting = Asked(brisk, "test/b")
    wait_until(lambda: state(brisk, "test/a") == "retiring", 60, what="a to be draining")
    assert len(running.text().split()) == 700
    assert waiting.text() == "word0 word1 word2"
    assert running.ended < waiting.ended


def test_under_steady_load_the_other_model_is_served_and_no_call_wakes_the_one_that_leaves(brisk: Cluster) -> None:
    ask(brisk, "[[tokens=1]]", "test/a")
    since = time.time()
    before = {name: set(_replicas(brisk, f"model-{name}")) for name in "ab"}
    seen: dict[str, set[str]] = {"a": set(), "b": set()}
    decided: dict[tuple[str, str, float], dict[str, Any]] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            details = serve_details(brisk)
            for line in rotation(brisk)["history"]:
                if line["at"] > since and line["action"] in WATCHED:
                    decided[line["action"], line["model"], line["at"]] = line
            for name, replicas in seen.items():
                replicas |= {one["replica_id"] for one in _listed_replicas(details, f"model-{name}")}

    watching = threading.Thread(target=watch)
    watching.start()
    # The other is asked for when the first has stayed its least time: from then on only max_wait protects it.
    stays_until = max(line["at"] for line in decisions(brisk, "ready", "test/a")) + MIN_RESIDENCY_S + 0.5
    after_s = max(4.0, stays_until - time.time())
    answers, other = asyncio.run(_steady(brisk, "test/a", "test/b", per_s=20, seconds=after_s + 14, after_s=after_s))
    wait_until(lambda: not rotation(brisk)["queue"], 60, what="the queue to be empty")
    stop.set()
    watching.join()
    assert {answer.status_code for answer in answers} == {200} and len(answers) >= 300
    assert other.status_code == 200, other.text
    # max_wait until the first model is asked to go, and one load: it leaves, and the other comes, with nothing between.
    asked, leaves = _first(decided, "queued", "b", 0), _first(decided, "revoke drain", "a", 0)
    gone, load = _first(decided, "gone", "a", leaves), _first(decided, "load", "b", 0)
    assert leaves - asked < MAX_WAIT_S + SLACK_S and load - gone < SLACK_S, sorted(decided)
    assert not [at for action, _, at in decided if action == "load" and asked < at < load], sorted(decided)
    for name in "ab":
        started = seen[name] - before[name]
        loads = [at for action, model, at in decided if (action, model) == ("load", f"test/{name}")]
        assert len(started) == len(loads), f"{name}: {started} were started, loads were decided at {loads}"


def _first(decided: dict[tuple[str, str, float], Any], actions: str, name: str, after: float) -> float:
    found = [at for action, model, at in decided if action in actions.split() and model == f"test/{name}"]
    return min(at for at in found if at >= after)


def _listed_replicas(details: dict[str, Any], application: str) -> list[dict[str, Any]]:
    return list(details[application]["deployments"]["model"]["replicas"])


def _replicas(cluster: Cluster, application: str) -> set[str]:
    return {one["replica_id"] for one in _listed_replicas(serve_details(cluster), application)}


async def _steady(
    cluster: Cluster, model: str, other: str, per_s: float, seconds: float, after_s: float
) -> tuple[list[httpx.Response], httpx.Response]:
    """Requests at an even pace to one model, and a single one to another in between."""
    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120, limits=limits) as client:

        async def one(name: str) -> httpx.Response:
            message = {"role": "user", "content": "[[tokens=1 pace=0]]"}
            return await client.post("/v1/chat/completions", json={"model": name, "messages": [message]})

        started, tasks = time.monotonic(), []
        single: asyncio.Task[httpx.Response] | None = None
        for n in range(int(per_s * seconds)):
            await asyncio.sleep(max(0.0, started + n / per_s - time.monotonic()))
            tasks.append(asyncio.create_task(one(model)))
            if single is None and n / per_s >= after_s:
                single = asyncio.create_task(one(other))
        assert single is not None
        return list(await asyncio.gather(*tasks)), await single


def test_a_load_whose_process_is_killed_is_tried_again_and_heals(brisk: Cluster) -> None:
    waiting = Asked(brisk, "test/slow-load")
    wait_until(lambda: state(brisk, "test/slow-load") == "loading", 60, what="the load to begin")
    victim = wait_until(
        lambda: next((pid for pid in brisk.model("test/slow-load")["pids"] if alive(pid)), None), what="its process"
    )
    os.kill(victim, signal.SIGKILL)
    assert waiting.text() == "word0 word1 word2"
    assert victim not in brisk.model("test/slow-load")["pids"]


def test_a_load_that_cannot_succeed_fails_at_once_and_the_fallback_answers(brisk: Cluster) -> None:
    reply = ask(brisk, "hi", "test/broken")
    assert reply.names[-1] == "end" and "switched" in reply.names
    shown = brisk.model("test/broken")
    assert (shown["state"], shown["reason"]) == ("failed", "The script asked for this failure.")
    loads = len(decisions(brisk, "load", "test/broken"))
    assert ask(brisk, "hi", "test/broken").names[-1] == "end"
    assert len(decisions(brisk, "load", "test/broken")) == loads  # not tried again
    [failure] = [one for one in rotation(brisk)["failures"] if one["model"] == "test/broken"]
    assert (failure["code"], failure["nextTry"]) == ("MODEL_LOAD_FAILED", None)
