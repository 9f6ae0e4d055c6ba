"""Rotunda and its peers, started for a scenario on loopback and free ports, and ended after it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import tree
from benchmarks.models import ensure, model_id
from benchmarks.surfaces import SURFACES, Surface
from deployments.ports import free_port
from tests.cluster import Cluster, model_application

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".cache" / "benchmarks" / "peers"
"""Where ``benchmarks/peers/install.sh`` puts the peers' own virtual environments."""
START_S = 180.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs: ``model`` is what a request must name, ``settings`` what it was told, in one line."""

    name: str
    url: str
    model: str
    surface: Surface
    settings: str
    processes: Callable[[], Iterable[psutil.Process]]
    cluster: Cluster | None = None


class PeerMissing(Exception):
    """A peer is not installed; says how to install it."""


@contextlib.contextmanager
def rotunda(
    models: Sequence[Mapping[str, Any]],
    *,
    sizes: Sequence[str] = (),
    gateway: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    applications: Sequence[Mapping[str, Any]] = (),
    gateway_from: str = "deployments.gateway:build",
    surface: str = "sse",
    num_cpus: int = 8,
    settings: str = "",
) -> Iterator[Server]:
    """The whole of Rotunda by its own launcher; returns once every model with ``min_replicas`` is in memory.

    Args:
        models: arguments of model applications, for instance ``{"model": "bench/5M", "min_replicas": 1}``.
        sizes: of benchmarks.models that the store must hold.
        gateway: the gateway's arguments; one ingress when None.
        environment: more variables.
        applications: more entries of ``serve_config.yaml``.
        gateway_from: import path of the gateway application.
    """
    home = Path(tempfile.mkdtemp(prefix="rotunda-bench-"))
    store = {"HF_MODEL_PATH": str(ensure(list(sizes)))} if sizes else {}
    declared = [model_application(f"model-{number}", **args) for number, args in enumerate(models)]
    cluster = Cluster(
        home,
        [*declared, *(dict(application) for application in applications)],
        environment={**store, **(environment or {})},
        gateway=gateway or {"ingress_min_replicas": 1, "ingress_max_replicas": 1},
        num_cpus=num_cpus,
    )
    cluster.config["applications"][0]["import_path"] = gateway_from
    try:
        _start(cluster)
        for args in models:
            if args.get("min_replicas"):
                _until_ready(cluster, str(args["model"]))
        first = str(models[0]["model"]) if models else ""
        name = f"Rotunda ({surface})"
        yield Server(name, cluster.url, first, SURFACES[surface], settings, cluster.processes, cluster)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            cluster.stop()
        shutil.rmtree(home, ignore_errors=True)


def _start(cluster: Cluster) -> None:
    try:
        cluster.start()
    except AssertionError as error:
        raise RuntimeError(f"Rotunda did not start ({error}): {cluster.log[-3000:]}") from None


def on(server: Server, surface: str) -> Server:
    """The same server, asked over another surface."""
    return replace(server, name=f"Rotunda ({surface})", surface=SURFACES[surface])


def _until_ready(cluster: Cluster, model: str) -> None:
    deadline = time.monotonic() + START_S
    while (shown := _shown(cluster, model)).get("state") not in ("ready", "busy"):
        if shown.get("state") == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"{model} is {shown.get('state', 'not known')}: {shown.get('reason')}")
        time.sleep(0.2)


def _shown(cluster: Cluster, model: str) -> dict[str, Any]:
    """The model as the cluster shows it; empty while it does not know it yet."""
    try:
        return cluster.model(model)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
        return {}


@contextlib.contextmanager
def _process(
    command: Sequence[str], ready: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, from when ``ready`` says so."""
    with tempfile.NamedTemporaryFile(prefix="rotunda-peer-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=log, stderr=log, process_group=0
        )
    try:
        deadline = time.monotonic() + START_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:4]} did not start: {Path(log.name).read_text()[-3000:]}")
            time.sleep(0.2)
        yield process
    finally:
        _end(process)
        Path(log.name).unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; whatever is left of its tree after that is killed."""
    family = tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for left in family:
        with contextlib.suppress(psutil.Error):
            left.kill()
    process.wait()


def _answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, timeout=2).status_code < 500
        return False

    return ready


@contextlib.contextmanager
def plain_serve(
    model: str, *, engine: str = "scripted", path: Path | None = None, options: Mapping[str, Any] | None = None
) -> Iterator[Server]:
    """benchmarks.peers.plain_serve: the same engine, in the deployment that one would write by hand."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.peers.plain_serve", "--port", str(port), "--model", model]
    command += ["--engine", engine, "--options", json.dumps(dict(options or {}))]
    command += ["--path", str(path)] if path else []
    clean = {name: "" for name in os.environ if name.startswith("RAY_SERVE_")}
    url = f"http://127.0.0.1:{port}"
    with _process(command, _answers(f"{url}/docs"), {**clean, "PYTHONPATH": str(ROOT)}) as process:
        yield Server(
            "plain Serve", url, model, SURFACES["completions"], "Serve's defaults, one FastAPI deployment",
            lambda: tree(process.pid),
        )  # fmt: skip


@contextlib.contextmanager
def instant(pace: float = 0.0) -> Iterator[Server]:
    """benchmarks.peers.instant: the upstream behind gateways."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.peers.instant", "--port", str(port), "--pace", str(pace)]
    url = f"http://127.0.0.1:{port}"
    with _process(command, _answers(f"{url}/v1/models")) as process:
        yield Server("direct", url, "instant", SURFACES["chat"], "raw asyncio", lambda: tree(process.pid))


def program(peer: str, name: str) -> str:
    """Path of a peer's program.

    Raises:
        PeerMissing: its environment was not made.
    """
    path = ENVIRONMENTS / peer / "bin" / name
    if not path.exists():
        raise PeerMissing(f"{peer} is not installed: run benchmarks/peers/install.sh {peer}")
    return str(path)


@contextlib.contextmanager
def transformers_serve(size: str, *, continuous: bool, threads: int) -> Iterator[Server]:
    """`transformers serve` of the same weights, in its default or its continuous-batching mode."""
    path = ensure([size]) / model_id(size)
    port = free_port()
    command = [program("transformers", "transformers"), "serve", str(path), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--device", "cpu", "--log-level", "error"]
    # Its default takes most of the host's memory for the cache, which the other servers need as well.
    blocks = 256 if size == "90M" else 512
    command += ["--continuous-batching", "--cb-num-blocks", str(blocks)] if continuous else []
    url = f"http://127.0.0.1:{port}"
    name = f"transformers serve{' CB' if continuous else ''}"
    mode = f"continuous batching, {blocks} cache blocks" if continuous else "default mode"
    with _process(command, _answers(f"{url}/health"), _threads(threads)) as process:
        yield Server(
            name, url, str(path), SURFACES["completions"], f"{mode}, float32, {threads} thread(s)",
            lambda: tree(process.pid),
        )  # fmt: skip


@contextlib.contextmanager
def llama_cpp(size: str, *, threads: int) -> Iterator[Server]:
    """llama.cpp's own server on an f32 GGUF of the same weights."""
    python = program("llama_cpp", "python")
    gguf = ENVIRONMENTS / "llama_cpp" / f"{size}.gguf"
    path = ensure([size]) / model_id(size)
    if not gguf.exists():
        subprocess.run([python, str(ROOT / "benchmarks/peers/to_gguf.py"), str(path), str(gguf)], check=True)
    port = free_port()
    command = [python, str(ROOT / "benchmarks/peers/llama_server.py"), str(gguf), "--port", str(port), "--name", size]
    command += ["--threads", str(threads), "--slots", "32", "--context", "512"]
    url = f"http://127.0.0.1:{port}"
    with _process(command, _answers(f"{url}/v1/models"), _threads(threads)) as process:
        yield Server(
            "llama.cpp", url, size, SURFACES["completions"], f"f32 GGUF, {threads} thread(s), 32 slots of 512 tokens",
            lambda: tree(process.pid),
        )  # fmt: skip


@contextlib.contextmanager
def litellm(upstream: Server) -> Iterator[Server]:
    """LiteLLM's proxy before an OpenAI-compatible upstream."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        params = {"model": f"openai/{upstream.model}", "api_base": f"{upstream.url}/v1", "api_key": "unused"}
        config.write_text(json.dumps({"model_list": [{"model_name": upstream.model, "litellm_params": params}]}))
        command = [program("litellm", "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
        # Neither side asks for a key, and both listen on loopback only.
        offline["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
        url = f"http://127.0.0.1:{port}"
        with _process(command, _answers(f"{url}/health/liveliness"), offline) as process:
            yield Server(
                "LiteLLM", url, upstream.model, SURFACES["chat"], "proxy, one worker", lambda: tree(process.pid)
            )


def _threads(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: str(threads) for name in names} | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
