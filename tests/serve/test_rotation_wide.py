"""The rotation with room for all: hundreds of models, replicas that come and go, and thresholds of memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator

import httpx
import psutil
import pytest

from tests.cluster import MODELS, Cluster, wait_until
from tests.e2e.test_chat import ask
from tests.rotation import Asked, decisions, rotation, scripted, state, with_platform
from tests.serve.test_fleet import serve_details

pytestmark = pytest.mark.own_cluster

MIB = 2**20
THRESHOLDS = (("WARNING", 0.15), ("CLEANUP", 0.18), ("CRITICAL", 0.21))
"""Above what the machine uses without the cluster; a script then allocates what is lacking."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """300 models in the store, three declared; memory for what is used."""
    home = tmp_path_factory.mktemp("wide")
    used = psutil.virtual_memory()
    fraction = 1 - used.available / used.total
    models = [
        scripted("scales", max_replicas=2, target_ongoing_requests=2, max_concurrency=4, options={"pace": 0.05}),
        scripted("stingy", max_replicas=2, target_ongoing_requests=2, num_cpus=7, options={"pace": 0.05}),
        scripted("idle", idle_unload_s=3),
    ]
    platform = {"keep_deployed_s": 3, "max_deployed": 4}
    thresholds = {f"MEMORY_{name}_THRESHOLD": f"{fraction + step:.4f}" for name, step in THRESHOLDS}
    cluster = with_platform(home, models, platform, **thresholds)
    for n in range(300):
        target = cluster.models / "many" / f"model-{n:03}"
        shutil.copytree(MODELS / "rotunda" / "tiny-chat", target, copy_function=os.link)
    with cluster.running():
        yield cluster


def test_300_models_cost_nothing_and_each_answers_on_first_use(wide: Cluster) -> None:
    assert httpx.get(f"{wide.url}/api/models", timeout=30).json()["count"] == 303
    routers = [process for process in wide.processes() if "router" in " ".join(process.cmdline())]
    controllers = [process for process in wide.processes() if "ServeController" in " ".join(process.cmdline())]
    assert routers and controllers
    time.sleep(3)
    # One of three windows must do: a slow moment of the machine makes the same work cost more time.
    windows: list[dict[int, float]] = []
    while not windows or (len(windows) < 3 and max(windows[-1].values()) >= 1.0):
        windows.append(_used((*routers, *controllers), 10))
    assert max(windows[-1].values()) < 1.0, windows  # seconds of processor time in ten
    assert ask(wide, "What is 17 + 25?", "many/model-123").text == "17 + 25 = 42."
    assert ask(wide, "What is 17 + 25?", "many/model-299").text == "17 + 25 = 42."
    measured = {name: wide.model(name) for name in ("many/model-123", "many/model-299")}
    for shown in measured.values():
        [pid] = shown["pids"]
        pss = psutil.Process(pid).memory_full_info().pss
        assert abs(shown["memoryBytes"] - pss) <= 0.1 * pss
    for name in measured:
        assert httpx.post(f"{wide.url}/api/models/{name}/unload", timeout=30).status_code == 200
    wait_until(
        lambda: not [name for name in serve_details(wide) if "many" in name], 60, what="their applications to go"
    )


def _used(processes: Iterable[psutil.Process], seconds: float) -> dict[int, float]:
    """Seconds of processor time that each process takes in the next ``seconds``."""
    before = {process: sum(process.cpu_times()[:2]) for process in processes}
    time.sleep(seconds)
    return {process.pid: sum(process.cpu_times()[:2]) - spent for process, spent in before.items()}


def test_a_model_grows_to_two_replicas_and_shrinks_again(wide: Cluster) -> None:
    ask(wide, "[[tokens=1]]", "test/scales")
    asked: list[Asked] = []

    def both_serve() -> bool:
        """One replica alone works on four at a time. There is work for two until the second has come, however long a
        process takes to start here."""
        waiting = sum(not one.ended for one in asked)
        asked.extend(Asked(wide, "test/scales", "[[tokens=300]]") for _ in range(12 - waiting))
        return wide.model("test/scales")["running"] > 4

    wait_until(both_serve, 90, what="both to serve")
    assert wide.model("test/scales")["replicas"] == 2
    assert all(one.text() for one in asked)
    wait_until(lambda: wide.model("test/scales")["replicas"] == 1, 60, what="one to be enough again")
    assert ask(wide, "[[tokens=1]]", "test/scales").text == "word0"


def test_a_replica_more_that_does_not_fit_blocks_nobody(wide: Cluster) -> None:
    ask(wide, "[[tokens=1]]", "test/stingy")
    asked = [Asked(wide, "test/stingy", "[[tokens=100]]") for _ in range(6)]
    wait_until(lambda: decisions(wide, "scale", "test/stingy"), 30, what="the router to be asked")
    assert ask(wide, "[[tokens=1]]", "test/idle").names[-1] == "end"
    assert all(one.text() for one in asked)
    [line, *_] = decisions(wide, "scale", "test/stingy")
    assert "does not fit" in line["reason"] and wide.model("test/stingy")["replicas"] == 1
    httpx.post(f"{wide.url}/api/models/test/stingy/unload", timeout=30)


def test_an_idle_model_leaves_memory_and_wakes_again(wide: Cluster) -> None:
    ask(wide, "[[tokens=1]]", "test/idle")
    wait_until(lambda: state(wide, "test/idle") == "cold", 30, what="it to be cold")
    assert ask(wide, "[[tokens=1]]", "test/idle").text == "word0"


def test_each_threshold_acts_once_and_is_armed_again(wide: Cluster) -> None:
    memory = psutil.virtual_memory()
    ask(wide, "[[tokens=1]]", "test/scales")
    ask(wide, "[[tokens=1 hold_mb=0]]", "test/stingy")
    # It holds what is to be too much: nobody else could be evicted for want of memory otherwise.
    assert httpx.post(f"{wide.url}/api/models/test/stingy/pin", timeout=30).status_code == 200
    counts = rotation(wide)["counts"]
    assert not {"memory_warning", "memory_cleanup", "memory_critical"} & counts.keys(), counts
    held = 0
    for name, _ in THRESHOLDS:
        wanted = float(wide.environment[f"MEMORY_{name}_THRESHOLD"]) + 0.012
        lacking = wanted * memory.total - (memory.total - psutil.virtual_memory().available)
        held += int(lacking / MIB)
        ask(wide, f"[[tokens=1 hold_mb={held}]]", "test/stingy")
        kind = f"memory_{name.lower()}"
        wait_until(lambda kind=kind: rotation(wide)["counts"].get(kind) == 1, 30, what=kind)  # type: ignore[misc]
    wait_until(lambda: state(wide, "test/scales") == "cold", 30, what="the idle model to be evicted")
    waiting = Asked(wide, "test/scales", "[[tokens=1]]")
    told = wait_until(lambda: rotation(wide)["queue"], 30, what="the load to be held back")
    assert "memory is short" in told[0]["reason"]
    assert [line["action"] for line in rotation(wide)["history"]].count("memory_critical") == 1
    ask(wide, "[[tokens=1 hold_mb=0]]", "test/stingy")
    assert waiting.text() == "word0"
    shown = rotation(wide)
    assert [shown["counts"][f"memory_{name.lower()}"] for name, _ in THRESHOLDS] == [1, 1, 1]
    httpx.post(f"{wide.url}/api/models/test/stingy/pin", json={"pinned": False}, timeout=30)
    httpx.post(f"{wide.url}/api/models/test/stingy/unload", timeout=30)
