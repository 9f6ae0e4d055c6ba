"""A cluster for tests: the product's own launcher in a process of its own, on free ports, with a home of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
import yaml

from deployments.ports import free_port

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models" / "huggingface"
START_S = 180.0
PORTS = 400
"""HTTP ports of one cluster's replicas. Clusters that run side by side must not share them: a proxy goes on asking a
port for a moment after its replica has gone, and would reach a replica of another cluster."""

Value = TypeVar("Value")

_blocks = itertools.count(os.getpid())


def wait_until(probe: Callable[[], Value], timeout_s: float = 30.0, every_s: float = 0.1, what: str = "") -> Value:
    """The first truthy answer of ``probe``; fails with its last one after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or probe} (last: {value!r})"
        time.sleep(every_s)


def model_application(name: str, **args: Any) -> dict[str, Any]:
    """One entry of ``applications`` for a model."""
    return {"name": name, "route_prefix": None, "import_path": "deployments.model:build", "args": args}


class Cluster:
    """Runs ``python -m deployments.local`` on a configuration; everything it makes lies below ``home``.

    Args:
        home: an empty folder; the model store is ``home/models``.
        applications: entries of ``serve_config.yaml`` beside the gateway.
        environment: more variables, for instance settings.
        gateway: the gateway's arguments.
        num_cpus: CPUs that Ray is told to offer.
    """

    def __init__(
        self,
        home: Path,
        applications: list[dict[str, Any]],
        environment: Mapping[str, str] | None = None,
        gateway: Mapping[str, Any] | None = None,
        num_cpus: int = 8,
    ) -> None:
        self.home = home
        self.models = home / "models"
        self.models.mkdir(parents=True, exist_ok=True)
        self.port, self.dashboard_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.dashboard_url = f"http://127.0.0.1:{self.dashboard_port}"
        self.mark = f"rotunda-test-{os.getpid()}-{self.port}"
        self.config_path = home / "serve_config.yaml"
        self.config: dict[str, Any] = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "logging_config": {"encoding": "JSON", "enable_access_log": False},
            "applications": [
                {
                    "name": "gateway",
                    "route_prefix": "/",
                    "import_path": "deployments.gateway:build",
                    "args": dict(gateway or {"ingress_min_replicas": 2, "ingress_max_replicas": 2}),
                },
                *applications,
            ],
        }
        self._first_port = 20_000 + PORTS * (next(_blocks) % 25)
        self.environment = self._environment(environment or {})
        self._num_cpus = num_cpus
        self.process: subprocess.Popen[str] | None = None
        self.log_path = home / "launcher.log"

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        # Nothing of a developer's own settings may leak into the cluster.
        inherited = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "TMPDIR")}
        return inherited | {
            "ROTUNDA_HOME": str(self.home),
            "HF_MODEL_PATH": str(self.models),
            "HF_HUB_OFFLINE": "1",
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(self._first_port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(self._first_port + PORTS - 1),
            "ROTUNDA_TEST_MARK": self.mark,
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def write_config(self) -> Path:
        self.config_path.write_text(yaml.safe_dump(self.config))
        return self.config_path

    def launch(self) -> subprocess.Popen[str]:
        """Start the launcher in a process group of its own, as a shell starts a foreground job."""
        self.write_config()
        command = [sys.executable, "-m", "deployments.local", str(self.config_path)]
        command += ["--dashboard-port", str(self.dashboard_port), "--num-cpus", str(self._num_cpus)]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, process_group=0, text=True
            )
        return self.process

    def start(self) -> Cluster:
        process = self.launch()
        wait_until(lambda: "is ready after" in self.log or process.poll() is not None, START_S, 0.25, "the launcher")
        assert process.poll() is None, self.log
        return self

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """It, started; its end must be a clean one."""
        try:
            yield self.start()
        finally:
            assert self.stop() == 0, self.log

    def stop(self) -> int:
        """End it as Ctrl-C does (the signal goes to the whole process group); returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the launcher did not end within 60 s:\n{self.log}")

    def processes(self) -> list[psutil.Process]:
        """Every process that descends from the launcher, found by the mark in its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("ROTUNDA_TEST_MARK") == self.mark and process.status() != "zombie":
                    found.append(process)
        return found

    def deploy(self) -> None:
        """What an operator does: ``serve deploy`` with the present configuration."""
        serve = Path(sys.executable).with_name("serve")
        command = [str(serve), "deploy", str(self.write_config()), "--address", self.dashboard_url]
        environment = self.environment | {"RAY_AUTH_MODE": "token"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **kwargs)

    def model(self, name: str) -> dict[str, Any]:
        """One model as ``GET /api/models/{id}`` shows it."""
        answer = httpx.get(f"{self.url}/api/models/{name}", timeout=30)
        answer.raise_for_status()
        return dict(answer.json())


def sse_events(lines: Iterator[str]) -> Iterator[tuple[str | None, str | None, str]]:
    """``(id, event, data)`` of each event of a ``text/event-stream`` (comments are left out)."""
    identifier: str | None = None
    name: str | None = None
    data: list[str] = []
    for line in lines:
        if line == "":
            if data:
                yield identifier, name, "\n".join(data)
            name, data = None, []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "id":
                identifier = value
            elif field == "event":
                name = value
            elif field == "data":
                data.append(value)
