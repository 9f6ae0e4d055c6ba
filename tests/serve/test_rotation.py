"""The rotation on a running cluster: many models, room for few, real replicas that come and go."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.cluster import MODELS, Cluster, model_application, wait_until
from tests.e2e.test_chat import Event, Reply, ask
from tests.ollama_server import OllamaServer, StandInModel
from tests.serve.test_fleet import alive, pids, serve_details
from tests.serve.test_remote_providers import upstream

pytestmark = pytest.mark.own_cluster

FAR = ("far-b:1b", "far-c:1b")
REAL = ("acme/one", "acme/two", "acme/three")
MAX_WAIT_S, MIN_RESIDENCY_S = 3.0, 10.0
SLACK_S = 2.0
"""How much later than at once the router may act: it looks every half second, and shares the machine."""
WATCHED = ("load", "queued", "revoke", "drain", "gone", "ready")
MIB = 2**20


def scripted(name: str, **args: Any) -> dict[str, Any]:
    options = {"tokens": 3, **args.pop("options", {})}
    return model_application(f"model-{name}", model=f"test/{name}", engine="scripted", options=options, **args)


def start(home: Path, applications: list[dict[str, Any]], platform: dict[str, Any], **settings: str) -> Cluster:
    cluster = Cluster(home, applications, settings)
    (home / "configs").mkdir()
    (home / "configs" / "platform.yaml").write_text(yaml.safe_dump(platform))
    return cluster


def rotation(cluster: Cluster) -> dict[str, Any]:
    return dict(httpx.get(f"{cluster.url}/api/rotation?history=500", timeout=30).json())


def decisions(cluster: Cluster, action: str, model: str) -> list[dict[str, Any]]:
    return [line for line in rotation(cluster)["history"] if (line["action"], line["model"]) == (action, model)]


def state(cluster: Cluster, model: str) -> str:
    return str(cluster.model(model)["state"])


class Asked:
    """A request on a thread of its own."""

    def __init__(self, cluster: Cluster, model: str, message: str = "hi", **body: Any) -> None:
        self.reply: Reply | None = None
        self.failure: BaseException | None = None
        self.ended = 0.0
        self._heard: list[Event] = []
        self._thread = threading.Thread(target=self._run, args=(cluster, model, message, body))
        self._thread.start()

    def _run(self, cluster: Cluster, model: str, message: str, body: dict[str, Any]) -> None:
        try:
            self.reply = ask(cluster, message, model, self._heard, **body)
        except BaseException as error:
            self.failure = error
        self.ended = time.monotonic()

    def begun(self) -> Asked:
        """It, once it has its first token. A model may be busy with something else before that."""
        wait_until(lambda: self.failure or any(name is None for _, name, _ in list(self._heard)), 90, what="a token")
        assert self.failure is None, self.failure
        return self

    def result(self, timeout_s: float = 180) -> Reply:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "no end in sight"
        assert self.reply is not None, self.failure
        return self.reply

    def text(self) -> str:
        reply = self.result()
        assert reply.names[-1] == "end", reply.payloads[-1]
        return reply.text


# Room for one of three


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
    cluster = start(home, [*models, far], platform, **settings)
    for name in REAL:
        shutil.copytree(MODELS / "rotunda" / "tiny-chat", cluster.models / name)
    cluster.start()
    try:
        yield cluster
    finally:
        assert cluster.stop() == 0, cluster.log


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


# Short waits, and loads that fail


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
    cluster = start(home, models, platform, ROTATION_TIMEOUT_MS="3000", MAX_QUEUE_SIZE="1000")
    cluster.start()
    try:
        yield cluster
    finally:
        assert cluster.stop() == 0, cluster.log


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


# Room for all, and many models

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
    cluster = start(home, models, platform, **thresholds)
    for n in range(300):
        target = cluster.models / "many" / f"model-{n:03}"
        shutil.copytree(MODELS / "rotunda" / "tiny-chat", target, copy_function=os.link)
    cluster.start()
    try:
        yield cluster
    finally:
        assert cluster.stop() == 0, cluster.log


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
