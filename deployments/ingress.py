"""The ingress: the surfaces of ``serve_app.api`` in a Ray Serve replica. Stateless but for the streams that it owns."""

import asyncio
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.handles import ModelHandles, RouterHandle, forever
from deployments.reporting import REPORT_S, Reporter
from deployments.serving import RouterLink
from serve_app.api.access import Access
from serve_app.api.app import create_app
from serve_app.api.services import Services
from serve_app.config import GatewayArgs, Settings, load
from serve_app.config.sources import PLATFORM
from serve_app.domain.backoff import Backoff
from serve_app.domain.breaker import Breakers, Rules
from serve_app.domain.errors import RotundaError
from serve_app.gateway import Gateway, Limits
from serve_app.replies import SessionLimits
from serve_app.sessions import Sessions
from serve_app.store import migrate
from serve_app.store.engine import check_nodes
from serve_app.store.images import ImageFiles
from serve_app.store.passwords import Passwords
from serve_app.store.store import Store
from serve_app.telemetry.figures import breaker_figures
from serve_app.telemetry.logs import set_up_logging
from serve_app.telemetry.metrics import Metric, gauge

logger = logging.getLogger(__name__)

PREPARE_S = 2.0
"""Between two tries to open a store that is away."""
SWITCH_S = 0.0005
"""After how long the event loop lets another thread of this process run that wants to: the store's threads need it for
a moment, many times in a transaction, and with the interpreter's 5 ms a busy ingress makes each moment as long."""
WANTED_ENVIRONMENT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""Serve works without them, at a several times higher cost per token; they are read before Ray starts."""


@serve.ingress()
class Ingress:
    """The composition root of one ingress replica.

    Args:
        args: the gateway application's arguments.
        router: handle of the router.
    """

    open_store = Store.attach
    """The store at a URL; the benchmarks put one in its place that keeps nothing."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: GatewayArgs, router: DeploymentHandle[Any]
    ) -> None:
        set_up_logging()
        sys.setswitchinterval(SWITCH_S)
        _warn_of_slow_modes()
        settings = load(platform=args.platform_path() or PLATFORM, args=args.settings).settings
        url = settings.database_url.get_secret_value()
        check_nodes(url, await asyncio.to_thread(_nodes))
        self._store = self.open_store(url)
        files = ImageFiles(settings.image_storage_path)
        owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        link, breakers, handles = RouterHandle(router), Breakers(_rules(settings)), ModelHandles(owner)
        gateway = Gateway(link, handles, _limits(settings), breakers=breakers, holder=owner)
        access = Access(self._store, Passwords(), None, settings)
        preparing = self._prepare(url, settings.database_auto_migrate, access)
        self._preparing = asyncio.get_running_loop().create_task(preparing)
        if url.startswith("sqlite"):
            await self._preparing
        self._reporter = Reporter("ingress", RouterLink())
        self._reporter.tracing.metrics.watch(lambda: breaker_figures(breakers.broken(time.monotonic())))
        self._reporter.tracing.metrics.watch(self._figures)
        limits, tracing = _session_limits(settings), self._reporter.tracing
        self._sessions = Sessions(self._store, gateway, files, access.image_url, limits, owner, tracing)
        loop = asyncio.get_running_loop()
        self._ticking = loop.create_task(self._sessions.tick())
        self._reporting = loop.create_task(forever(self._reporter.report, REPORT_S))
        self._keeping = loop.create_task(gateway.leases.keep())
        self._services = Services(
            settings,
            self._store,
            gateway,
            self._sessions,
            files,
            access,
            _problems(self._store, gateway),
            self._reporter.tracing,
            link,
        )
        self._sweeping = loop.create_task(self._services.archive.run())

    def _figures(self) -> Iterator[Metric]:
        yield gauge("rotunda_sessions_active", "Stream sessions that run.", {(): float(self._sessions.running)})

    async def _prepare(self, url: str, auto_migrate: bool, access: Access) -> None:
        """Bring the schema up to date, where that is wanted, and open the store.

        A PostgreSQL that is away, or waits for an operator's migration, keeps the ingress unready, not from starting:
        ``/ready`` says what is wrong. With SQLite the start fails; it is all here.
        """
        while True:
            try:
                if auto_migrate or url.startswith("sqlite"):
                    await asyncio.to_thread(migrate.upgrade, url)
                access.unlock(await self._store.signing_key())
                return
            except RotundaError as error:
                if url.startswith("sqlite"):
                    raise
                logger.warning("the store is not ready: %s", error)
            await asyncio.sleep(PREPARE_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._services)

    async def end_streams(self) -> None:
        """End every running reply as terminated by the shutdown; Serve would otherwise wait for the open streams."""
        await self._sessions.close()

    async def check_health(self) -> None:
        """Serve replaces the ingress when it no longer keeps its sessions or its leases."""
        for task in (self._ticking, self._keeping):
            if task.done():
                raise RuntimeError("a loop of the ingress has ended") from task.exception()

    async def __del__(self) -> None:
        # Not an end of the replies: where this replica is replaced, the next one goes on with them.
        await self._sessions.hand_over()
        for task in (self._preparing, self._ticking, self._keeping, self._reporting):
            task.cancel()
        await self._reporter.close()
        self._sweeping.cancel()
        await self._store.close()


def _nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def _warn_of_slow_modes() -> None:
    missing = [f"{name}={value}" for name, value in WANTED_ENVIRONMENT.items() if os.environ.get(name) != value]
    if missing:
        logger.warning(
            "Serve runs without %s: it works, but each token costs several times more. "
            "Set them before Ray starts (make serve does).",
            " and ".join(missing),
        )


def _limits(settings: Settings) -> Limits:
    backoff = Backoff(1 + settings.rotation_retry_attempts, settings.rotation_retry_delay_ms / 1000)
    return Limits(
        load_s=settings.hf_load_timeout_ms / 1000,
        first_token_s=settings.first_token_timeout_ms / 1000,
        idle_s=settings.idle_timeout_ms / 1000,
        total_s=settings.hf_model_timeout_ms / 1000,
        backoff=backoff,
    )


def _rules(settings: Settings) -> Rules:
    return Rules(settings.circuit_breaker_threshold, settings.circuit_breaker_timeout_ms / 1000)


def _session_limits(settings: Settings) -> SessionLimits:
    return SessionLimits(
        tick_s=settings.stream_tick_ms / 1000,
        detach_grace_s=settings.detach_grace_ms / 1000,
        session_timeout_s=settings.stream_session_timeout_ms / 1000,
        max_sessions=settings.max_stream_sessions,
        max_history=settings.max_history_messages,
    )


def _problems(store: Store, gateway: Gateway) -> Callable[[], Awaitable[list[str]]]:
    async def problems() -> list[str]:
        found: list[str] = []
        try:
            await store.ping()
        except RotundaError as error:
            found.append(error.message)
        try:
            found.extend((await gateway.router.view()).notes)
        except RotundaError as error:
            found.append(error.message)
        return found

    return problems
