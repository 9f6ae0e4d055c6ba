"""``make serve`` as a person meets it: a wrong setting, a running server with keys, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster import MODELS, ROOT, Cluster, model_application, sse_events, wait_until

KEY = "a-key-of-many-characters"


@pytest.mark.parametrize(
    ("name", "value"), [("HF_STREAM_CHUNK_SIZE", "0"), ("MEMORY_WARNING_THRESHOLD", "0.99"), ("API_KEYS", "short")]
)
def test_a_wrong_setting_ends_make_serve_with_the_report(tmp_path: Path, name: str, value: str) -> None:
    cluster = Cluster(tmp_path, [], {name: value})
    assert cluster.launch().wait(60) == 2
    assert name in cluster.log and "Traceback" not in cluster.log
    assert not cluster.processes()


def test_a_wrong_application_argument_ends_it_too(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [model_application("model-a", model="a/b", num_cpus=0.5)])
    assert cluster.launch().wait(60) == 2
    assert "num_cpus" in cluster.log and "Traceback" not in cluster.log


def test_an_exposed_host_without_keys_is_refused(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [])
    cluster.config["http_options"]["host"] = "0.0.0.0"
    assert cluster.launch().wait(60) == 2
    assert "API_KEYS" in cluster.log


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [])
    with socket.create_server(("127.0.0.1", cluster.port)):
        assert cluster.launch().wait(60) == 2
    assert f"Nothing can listen on 127.0.0.1:{cluster.port}" in cluster.log
    assert "Starting Ray" not in cluster.log and "Traceback" not in cluster.log


def test_a_serve_that_does_not_start_is_told_in_plain_words(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [])
    with socket.create_server(("127.0.0.1", int(cluster.environment["RAY_SERVE_HAPROXY_STATS_PORT"]))):
        assert cluster.launch().wait(120) == 1
    assert "Serve did not start: RuntimeError: HAProxy crashed during startup" in cluster.log
    assert "Address already in use" in cluster.log and "Traceback" not in cluster.log
    wait_until(lambda: not cluster.processes(), 15, what="every process to end")


def test_a_ray_that_does_not_start_is_told_in_plain_words(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [], num_cpus=-1)
    assert cluster.launch().wait(60) == 1
    assert "Ray did not start: Resource quantities must be nonnegative" in cluster.log
    assert "Traceback" not in cluster.log
    wait_until(lambda: not cluster.processes(), 15, what="every process to end")


def test_make_serve_hands_the_exit_code_on(tmp_path: Path) -> None:
    venv = Path(sys.executable).parent.parent
    if not (venv / "installed").exists():
        pytest.fail("the virtual environment was not made by make: run the tests with `make test`")
    cluster = Cluster(tmp_path, [], {"HF_STREAM_CHUNK_SIZE": "0"})
    command = ["make", "serve", f"VENV={venv}", f"CONFIG={cluster.write_config()}"]
    ended = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "HF_STREAM_CHUNK_SIZE" in ended.stderr


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of its own that wants an API key, and is to be ended by the test."""
    slow = model_application("model-slow", model="test/slow", engine="scripted", options={"tokens": 500, "pace": 0.1})
    cluster = Cluster(tmp_path_factory.mktemp("guarded"), [slow], {"API_KEYS": KEY})
    shutil.copytree(MODELS / "rotunda" / "tiny-chat", cluster.models / "rotunda" / "tiny-chat")
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.own_cluster
def test_with_keys_every_route_but_health_wants_one(guarded: Cluster) -> None:
    with guarded.client() as client:
        assert client.get("/health").status_code == 200
        for method, path in [
            ("GET", "/ready"),
            ("GET", "/api/models"),
            ("GET", "/api/images/1"),
            ("POST", "/api/stream-message"),
            ("POST", "/api/terminate-stream"),
            ("GET", "/graphql?query={availableModels{count}}"),
            ("POST", "/graphql"),
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
        ]:
            answer = client.request(method, path)
            assert answer.status_code == 401, (method, path, answer.text)
        wrong = {"Authorization": "Bearer " + KEY[:-1] + "x"}
        assert client.get("/api/models", headers=wrong).status_code == 401
        right = {"Authorization": f"Bearer {KEY}"}
        wait_until(lambda: client.get("/api/models", headers=right).json()["count"] >= 1, what="the models")


@pytest.mark.own_cluster
def test_two_clusters_on_one_machine_share_no_port(cluster: Cluster, guarded: Cluster) -> None:
    """Serve's proxies bind theirs with SO_REUSEPORT: one cluster would answer for the other."""
    for one in (cluster, guarded):
        wait_until(lambda one=one: {one.port, one.dashboard_port} <= _listening(one), what="its ports")  # type: ignore[misc]
    assert not _listening(cluster) & _listening(guarded)


def _listening(cluster: Cluster) -> set[int]:
    found = set()
    for process in cluster.processes():
        with contextlib.suppress(psutil.Error):
            found |= {one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.own_cluster
def test_ctrl_c_saves_the_partial_reply_and_leaves_nothing_behind(guarded: Cluster) -> None:
    events: list[tuple[str | None, str | None, str]] = []
    body = {"message": "anything", "model": "test/slow"}
    headers = {"Authorization": f"Bearer {KEY}"}

    def read() -> None:
        with guarded.client(headers=headers) as client, client.stream("POST", "/api/stream-message", json=body) as got:
            for event in sse_events(got.iter_lines()):
                events.append(event)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    wait_until(lambda: len(events) > 5, 60, what="the stream to run")

    interrupted = time.monotonic()
    assert guarded.stop() == 0, guarded.log
    assert time.monotonic() - interrupted <= 10
    reader.join(10)
    assert events[-1][1] == "terminated"
    assert json.loads(events[-1][2])["reason"] == "SERVER_SHUTDOWN"
    wait_until(lambda: not guarded.processes(), 3, what="every process to end")
    for port in (guarded.port, guarded.dashboard_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    with sqlite3.connect(guarded.home / "data" / "rotunda.db") as database:
        rows = database.execute("SELECT status, partial_response FROM stream_sessions").fetchall()
        saved = database.execute("SELECT text FROM messages WHERE sender = 'llm'").fetchall()
    assert [status for status, _ in rows] == ["TERMINATED"]
    assert saved == [(rows[0][1],)]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{guarded.url}/health")


@pytest.mark.own_cluster
@pytest.mark.parametrize("moment", ["Starting Ray", "Starting Serve"])
def test_ctrl_c_while_it_starts_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    """A terminal sends it to Ray's processes as well, and some of them end before they have answered."""
    cluster = Cluster(tmp_path, [])
    process = cluster.launch()
    wait_until(lambda: moment in cluster.log or process.poll() is not None, 60, 0.05, moment)
    assert cluster.stop() == 0, cluster.log  # within a minute: Ray's own start cannot be cut short
    wait_until(lambda: not cluster.processes(), 15, what="every process to end")
