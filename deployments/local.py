"""`make serve`: a Ray cluster of this machine alone, with everything in ``serve_config.yaml`` on it, in the foreground.

Ray reads its environment when it is imported, in every process: the variables are set first. Ctrl-C and SIGTERM end the
applications (running replies are saved as terminated), then the cluster; no process is left.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from deployments.ports import free_port, is_free
from serve_app.config import Settings, check_exposure, load
from serve_app.config.consistency import contradictions
from serve_app.config.report import invalid
from serve_app.config.serve_file import ServeFile, read_serve_file
from serve_app.config.sources import PLATFORM
from serve_app.domain.errors import InvalidConfig
from serve_app.store import migrate

logger = logging.getLogger("rotunda")

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
    # Serve's own default is 5, three times: on a busy machine it then kills a proxy that is only slow to start.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # Three failed looks make a proxy dead. Serve's own default is 10: half a minute in which nobody is answered.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "20000",
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "29999",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "67108864",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray's own default is 15: on a busy machine the replicas would be the last to run.
    "RAY_worker_niceness": "0",
}
"""What Ray and Serve are told; a value that is set already wins.

Throughput mode would hold a thousand log records back in memory, for the sake of the access log, which is off.
"""

PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": None,
}
"""Ports that a cluster needs beside its own two, and the usual ones.

HAProxy does not start when one of its own is taken. The fallback proxy, which answers before HAProxy knows an ingress,
binds with SO_REUSEPORT: of two clusters on one machine with the same port, one would answer for the other.
"""

ERROR_LINE = re.compile(r"[\w.]+(Error|Exception): ")
START_TIMEOUT_S = 180.0
SHUTDOWN_S = {"the replies": 10.0, "Serve": 20.0, "Ray": 10.0}
"""How long each may take to end. None of the three knows a limit of its own that holds on a machine out of breath."""
LEAVE_S = 2.0
"""How long Ray's processes may take to end after it did."""


def main() -> int:
    """Run until Ctrl-C; the exit code is 0 after a clean end, 2 for a wrong configuration, 1 when Serve fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    arguments = _parser().parse_args()
    stop = threading.Event()
    _catch_signals(stop)
    try:
        settings, file = _settings(arguments.config)
    except InvalidConfig as error:
        logger.error("%s", error)
        return 2
    if not is_free(file.port, file.host):
        logger.error(
            "Nothing can listen on %s:%d: another server does, or it is no address of this machine. "
            "See http_options in %s.",
            *(file.host, file.port, arguments.config),
        )
        return 2
    _set_environment(file.port, arguments.dashboard_port)
    return _run(settings, file, arguments, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("config", type=Path, help="the file that `serve deploy` would take")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="of Ray's dashboard (default %(default)s)")
    parser.add_argument("--num-cpus", type=int, default=None, help="CPUs that Ray offers (default: all)")
    return parser


def _settings(path: Path) -> tuple[Settings, ServeFile]:
    """Everything judged before anything starts; SQLite is migrated here, so that a failure shows here."""
    file = read_serve_file(path)
    loaded = load(platform=file.gateway.platform_path() or PLATFORM, args=file.gateway.settings)
    for warning in (*loaded.warnings, *check_exposure(file.host, loaded.settings)):
        logger.warning("warning: %s", warning)
    if problems := contradictions(file, loaded):
        raise invalid(problems)
    url = loaded.settings.database_url.get_secret_value()
    if url.startswith("sqlite"):
        migrate.upgrade(url)
    return loaded.settings, file


def _set_environment(http_port: int, dashboard_port: int) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_SERVE_HAPROXY_MAXCONN", str(_most_connections()))
    ours = {http_port, dashboard_port, *(int(os.environ[name]) for name in PORTS if name in os.environ)}
    for name, usual in PORTS.items():
        if name not in os.environ:
            port = free_port(usual, avoid=ours)
            os.environ[name] = str(port)
            ours.add(port)
    os.environ.setdefault("RAY_DASHBOARD_ADDRESS", f"http://127.0.0.1:{dashboard_port}")
    home = str(Path.cwd())
    os.environ.setdefault("ROTUNDA_HOME", home)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))


def _most_connections() -> int:
    """HAProxy takes 2.5 file descriptors for each connection, and does not start when it may not have them."""
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 20_000 if descriptors == resource.RLIM_INFINITY else min(20_000, int((descriptors - 500) / 2.5))


def _run(settings: Settings, file: ServeFile, arguments: argparse.Namespace, stop: threading.Event) -> int:
    started = time.monotonic()
    logger.info("Starting Ray …")
    try:
        address = _start_ray(arguments, stop)
        if address is None:
            return 0 if stop.is_set() else 1
        _catch_signals(stop)  # ray.init put its own handler in place
        problem = _unless_stopped(lambda: _start(address, arguments.config, stop), stop)
        if problem is not None:
            logger.error("%s", problem)
            return 1
        if not stop.is_set():
            _greet(settings, file, time.monotonic() - started)
            stop.wait()
            logger.info("Stopping …")
            _shut_down()
        return 0
    except Exception:
        if stop.is_set():  # Ctrl-C came while Ray started, and reached its processes as well
            return 0
        raise
    finally:
        _end_ray()


def _start_ray(arguments: argparse.Namespace, stop: threading.Event) -> str | None:
    """Start a cluster on this machine; where its dashboard is, or None when that failed, with the reason told."""
    import ray

    try:
        context = ray.init(
            num_cpus=arguments.num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=arguments.dashboard_port,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=256 * 2**20,
        )
    except Exception as error:  # the border to Ray
        if not stop.is_set():
            told = str(error).partition("\n")[0] or type(error).__name__
            logger.error("Ray did not start: %s", told)
            logger.error("Its logs are below /tmp/ray/session_latest/logs. A very busy machine may be too slow for it.")
        return None
    return f"http://{context.dashboard_url}"


def _end_ray() -> None:
    """End Ray, and what it leaves behind when it is ended while it starts: the dashboard's own processes."""
    import ray

    family = psutil.Process().children(recursive=True)
    _end("Ray", ray.shutdown)
    _, left = psutil.wait_procs(family, LEAVE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _catch_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _unless_stopped(work: Callable[[], str | None], stop: threading.Event) -> str | None:
    """What ``work`` returns or raises; None as soon as it is to stop. A terminal's Ctrl-C reaches Ray's dashboard too,
    which may then never answer what it was asked."""
    outcome: list[str | Exception | None] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:  # the border to Ray
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and not stop.is_set():
        thread.join(0.1)
    if stop.is_set():
        return None
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _start(address: str, config: Path, stop: threading.Event) -> str | None:
    """Deploy everything; returns once it runs, or with what is wrong."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    logger.info("Starting Serve …")
    client = ServeSubmissionClient(address)
    try:
        client.deploy_applications(yaml.safe_load(config.read_text()))
    except RuntimeError as error:  # what the dashboard answers holds the whole traceback of its process
        return f"Serve did not start: {_last_error(str(error))}"
    return _wait_until_running(client, stop)


def _last_error(told: str) -> str:
    """The error at the end of a traceback, without the frames before it."""
    lines = told.strip().splitlines()
    last = max((number for number, line in enumerate(lines) if ERROR_LINE.match(line)), default=0)
    return "\n".join(lines[last:])


def _wait_until_running(client: Any, stop: threading.Event) -> str | None:
    """Return once every application runs, or say in plain words why one does not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not stop.wait(0.25):
        applications = dict(client.get_serve_details().get("applications") or {})
        states = {name: app["status"] for name, app in applications.items()}
        for name, app in applications.items():
            if app["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                return f"{name} did not start: {app.get('message') or app['status']}"
        if states and set(states.values()) == {"RUNNING"}:
            return None
        if time.monotonic() > deadline:
            return f"Serve was not ready after {START_TIMEOUT_S:g} s: {states}"
    return None


def _shut_down() -> None:
    """End the replies first (they are saved as terminated), then Serve: it would wait for open streams."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    _end("the replies", lambda: asyncio.run(_end_streams()))
    _end("Serve", serve.shutdown)


def _end(what: str, work: Callable[[], None]) -> None:
    """Do ``work``, which ends something. What fails or takes too long is told and left: its processes are killed."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # the border to Ray
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SHUTDOWN_S[what])
    if thread.is_alive():
        logger.warning("%s did not end within %g s; processes that are left are killed", what, SHUTDOWN_S[what])
    for error in failures:
        logger.warning("%s could not be ended: %r", what, error)


async def _end_streams() -> None:
    # In throughput mode a handle works only inside an event loop.
    from ray.serve.handle import DeploymentHandle

    ingress: DeploymentHandle[Any] = DeploymentHandle("ingress", "gateway")
    await ingress.broadcast("end_streams").results_async(timeout_s=5)


def _greet(settings: Settings, file: ServeFile, seconds: float) -> None:
    url = f"http://{file.host}:{file.port}"
    model = settings.default_model or next((args.model for args in file.models), "MODEL")
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_keys else ""
    body = f'{{"model": "{model}", "message": "What is 17 + 25?"}}'
    logger.info(
        "\nRotunda is ready after %.0f s at %s\n\n"
        "  curl -N %s/api/stream-message%s -H 'Content-Type: application/json' \\\n    -d '%s'\n\n"
        "Ctrl-C ends it.",
        seconds,
        url,
        url,
        key,
        body,
    )


if __name__ == "__main__":
    exit_code = main()
    # All is ended or killed. What Ray does at a process's exit would wait for a thread that is stuck in it.
    sys.stderr.flush()
    os._exit(exit_code)
