"""The platform in one process: real store, sessions, gateway and scripted engines; router and backend are doubles.

``LocalRouter`` decides by the domain's own rules over a catalogue and a fleet whose states a test sets.
``LocalBackend`` calls engines that live beside it. Nothing here waits longer than a test wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from serve_app.api.access import Access
from serve_app.api.app import create_app
from serve_app.api.services import Services
from serve_app.config import Settings
from serve_app.domain.backoff import Backoff
from serve_app.domain.catalog import Capability, Catalogue, Entry, ModelInfo, ModelState, application_name
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import ProviderUnavailable
from serve_app.domain.fleet import Failed, Fleet, FleetView, ProviderStatus, Report
from serve_app.domain.generation import GenerationRequest, Item
from serve_app.domain.leasing import Orders
from serve_app.domain.leasing import Report as HolderReport
from serve_app.domain.rotation_view import HISTORY, RotationView
from serve_app.domain.routing import Admission, Ask, Granted, Lease, Waiting, choose
from serve_app.engines.base import EngineOptions
from serve_app.engines.scripted import ScriptedEngine
from serve_app.gateway import Gateway, Limits
from serve_app.replies import SessionLimits
from serve_app.sessions import Sessions
from serve_app.store import migrate
from serve_app.store.images import ImageFiles
from serve_app.store.passwords import Passwords
from serve_app.store.store import Store
from serve_app.telemetry.recording import in_replica
from serve_app.telemetry.tracing import Tracing

CHAT = frozenset({Capability.CHAT, Capability.COMPLETION})
MODELS = (
    ModelInfo("test/chat", "", capabilities=CHAT | {Capability.VISION}, context_length=100_000),
    ModelInfo("org/name:tag", "", capabilities=CHAT, context_length=64),
)
"""What a platform offers unless a test says otherwise; the first is the default model."""
_CHANGES = ("add", "remove")


def entry_of(info: ModelInfo) -> Entry:
    return Entry(info.id, "huggingface", application_name(info.id), "model", info, declared=True)


class LocalRouter:
    """A router whose fleet stands still until a test, or a command, changes it. Every model is ready at first."""

    def __init__(self, infos: Iterable[ModelInfo], default_model: str | None, aliases: dict[str, str]) -> None:
        self.catalogue = Catalogue([entry_of(info) for info in infos], aliases)
        self.fleet = Fleet()
        self.default_model = default_model
        self.pinned: frozenset[str] = frozenset()
        self.providers: tuple[ProviderStatus, ...] = (
            ProviderStatus("huggingface", "huggingface", "ok", len(self.catalogue.entries)),
        )
        self.notes: tuple[str, ...] = ()
        self.rotation_view = RotationView()
        self.removed: set[str] = set()
        self.asked: list[Ask] = []
        self.cancelled: list[str] = []
        self._held: dict[str, tuple[int, str]] = {}
        for entry in self.catalogue.entries:
            self.put(entry.id, ModelState.READY)

    def put(self, model: str, state: ModelState) -> None:
        """Put a model into a state; FAILED as if its files could not be loaded."""
        application = self.catalogue.resolve(model).application
        self.fleet.forget(application, "replica")
        self.fleet.failed.pop(application, None)
        if state is ModelState.FAILED:
            error = {"code": "MODEL_LOAD_FAILED", "message": "A file is missing.", "retryable": False}
            self.fleet.failed[application] = Failed("", error)
        elif state is not ModelState.COLD:
            self.fleet.hear(Report(application, "replica", state), now=0.0)

    def hold(self, model: str, position: int = 1, reason: str = "memory is full") -> None:
        """Let requests for the model wait, until :meth:`release`."""
        self._held[self.catalogue.resolve(model).id] = (position, reason)

    def release(self, model: str) -> None:
        del self._held[self.catalogue.resolve(model).id]

    async def admit(self, ask: Ask) -> Admission:
        self.asked.append(ask)
        route = choose(ask, self.catalogue, self.fleet.at(0.0), self.default_model)
        held = self._held.get(route.first.entry.id)
        if held is not None:
            return Waiting(ask.ticket, route, held[0], held[1], eta_ms=1500, retry_in_s=0.01)
        return Granted(route, Lease(route.first.entry.full_name, epoch=1, ttl_s=60.0))

    async def cancel(self, ticket: str) -> None:
        self.cancelled.append(ticket)

    async def sync(self, report: HolderReport) -> Orders:
        return Orders()

    async def view(self) -> FleetView:
        return self.fleet.view(self.catalogue, 0.0, self.pinned, self.providers, self.notes)

    async def rotation(self, history: int = HISTORY) -> RotationView:
        return replace(self.rotation_view, history=self.rotation_view.history[-history:] if history else ())

    async def command(self, action: str, model: str = "", **arguments: Any) -> dict[str, Any]:
        if action == "set_rotation":
            changes = {kind: {self.catalogue.resolve(name).id for name in arguments.get(kind, ())} for kind in _CHANGES}
            self.removed = (self.removed | changes["remove"]) - changes["add"]
            return {"removed": sorted(self.removed)}
        if action == "emergency_cleanup":
            idle = [entry.id for entry in self.catalogue.entries if entry.full_name not in self.pinned]
            for name in idle:
                self.put(name, ModelState.COLD)
            return {"evicting": idle}
        entry = self.catalogue.resolve(model)
        if action == "load":
            self.put(entry.id, ModelState.READY)
        elif action == "unload":
            self.put(entry.id, ModelState.COLD)
        elif action == "pin":
            change = {entry.full_name}
            self.pinned = self.pinned | change if arguments.get("pinned", True) else self.pinned - change
        elif action != "plan":
            raise AssertionError(f"the router has no command {action}")
        state, reason = self.fleet.state_of(entry, 0.0)
        answer = {"model": self.catalogue.name_of(entry), "state": state.value, "reason": reason}
        return {**answer, "verdict": "fits"} if action == "plan" else answer


class ForgetfulGateway(Gateway):
    """Asks the router for every request, so that it sees at once what a test has changed."""

    async def _admit(self, ask: Ask) -> Admission:
        self._grants.clear()
        return await super()._admit(ask)


class LocalBackend:
    """Engines in this process; a cold one is ready as soon as it is called, unless a test holds its loading."""

    def __init__(self, engines: dict[str, ScriptedEngine], router: LocalRouter) -> None:
        self.engines = engines
        self.requests: list[GenerationRequest] = []
        self.loading: dict[str, asyncio.Event] = {}
        self.tracing = Tracing.off()
        """Of the replicas: nothing that the ingress records is known to it."""
        self._router = router

    async def stream(self, entry: Entry, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]:
        self.requests.append(request)
        if entry.id in self.loading:
            await self.loading[entry.id].wait()
        self._router.put(entry.id, ModelState.READY)
        with in_replica(self.tracing, request, entry.id) as request:
            items = self.engines[entry.id].generate(request)
            assert isinstance(items, AsyncGenerator)
            async with aclosing(items):
                async for item in items:
                    yield item

    async def embed(self, entry: Entry, request: EmbeddingRequest, epoch: int) -> Embeddings:
        """Vectors that tell the lengths of their texts."""
        texts = request.texts
        with in_replica(self.tracing, request, entry.id) as request:
            return Embeddings(
                tuple((float(len(text)), 1.0) for text in texts), sum(len(text.split()) for text in texts)
            )


@dataclass
class LocalPlatform:
    """The services over the doubles, and the application over the services."""

    services: Services
    router: LocalRouter
    backend: LocalBackend
    app: FastAPI
    ticking: asyncio.Task[None]
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def engine(self) -> ScriptedEngine:
        """The default model's."""
        return self.backend.engines[MODELS[0].id]

    def client(self, **headers: str) -> httpx.AsyncClient:
        """A client without a network; it sees a response only when it is complete."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://localhost", headers=headers, timeout=30
        )

    async def serve(self) -> str:
        """The URL of a real server for this application, which ends with the platform."""
        return await self._stack.enter_async_context(serving(self.app))

    async def connect(self, **headers: str) -> httpx.AsyncClient:
        """A client of such a server: it sees chunks as they come, and may leave."""
        return httpx.AsyncClient(base_url=await self.serve(), headers=headers, timeout=30)

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Let nothing reach the database from here: to all others this ingress is dead, and it does not know."""
        database = self.services.store._db

        def unreachable(*_: Any) -> Any:
            raise ProviderUnavailable("The conversation store cannot be reached now.")

        database.read = database.write = database.write_at_once = unreachable  # type: ignore[method-assign]
        yield
        del database.read, database.write, database.write_at_once

    async def close(self) -> None:
        await self.services.sessions.close()
        await self._stack.aclose()
        self.ticking.cancel()
        self.services.passwords.close()
        await self.services.store.close()


async def build_services(
    tmp_path: Path,
    *,
    models: Iterable[ModelInfo] = MODELS,
    aliases: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
    tracing: Tracing | None = None,
    owner: str = "this-ingress",
    **settings: Any,
) -> LocalPlatform:
    """A platform whose data lie below ``tmp_path``; close it.

    Args:
        tmp_path: an empty folder.
        models: what there is; a scripted engine each.
        aliases: other names of models.
        extra: options of the scripted engines.
        tracing: of the ingress.
        owner: the name of the ingress; another one may share the ``database_url``.
        settings: fields of :class:`Settings`.
    """
    infos = tuple(models)
    url = settings.pop("database_url", None) or await _fresh_database(tmp_path)
    known = {
        "database_url": url,
        "image_storage_path": tmp_path / "images",
        "default_model": infos[0].id,
        "stream_tick_ms": 10,
        **settings,
    }
    values = Settings(**known)
    store = await Store.open(url)
    router = LocalRouter(infos, values.default_model, aliases or {})
    options = EngineOptions(extra=tuple((extra or {}).items()))
    backend = LocalBackend({info.id: ScriptedEngine(info, options) for info in infos}, router)
    gateway = ForgetfulGateway(router, backend, Limits(backoff=Backoff(base_s=0.001)))
    files = ImageFiles(values.image_storage_path)
    access = Access(store, Passwords(), await store.signing_key(), values)
    sessions = Sessions(store, gateway, files, access.image_url, _session_limits(values), owner, tracing)

    async def problems() -> list[str]:
        return list((await router.view()).notes)

    traced = tracing or Tracing.off()
    services = Services(values, store, gateway, sessions, files, access, problems, traced)
    ticking = asyncio.get_running_loop().create_task(sessions.tick())
    return LocalPlatform(services, router, backend, create_app(services), ticking)


def _session_limits(settings: Settings) -> SessionLimits:
    return SessionLimits(
        tick_s=settings.stream_tick_ms / 1000,
        ownership_s=1.0,
        sweep_s=0.5,
        detach_grace_s=settings.detach_grace_ms / 1000,
        session_timeout_s=settings.stream_session_timeout_ms / 1000,
        max_sessions=settings.max_stream_sessions,
        max_history=settings.max_history_messages,
    )


async def _fresh_database(tmp_path: Path) -> str:
    """A migrated SQLite file: the migrations run once in this process, every platform gets a copy."""
    template = Path(_template_folder().name) / "migrated.db"
    if not template.exists():
        await migrate.upgrade_async(f"sqlite+aiosqlite:///{template}")
    target = tmp_path / "rotunda.db"
    shutil.copyfile(template, target)
    return f"sqlite+aiosqlite:///{target}"


@functools.cache
def _template_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serve over real sockets, in this event loop: the way to see chunks and disconnects."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
    )
    server = _Server(config)
    running = asyncio.get_running_loop().create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event to wait for
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await running
