"""The router: one replica that knows every model, hears every replica, and says who may answer.

It learns of declared models from Serve's REST API without waking them, and of the others from the model store; it
deploys a discovered model on first use and takes it away when its files change or go.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve import RunTarget
from ray.serve.handle import DeploymentHandle

from deployments import model as model_deployment
from deployments.capacity import Nodes
from deployments.demand import local_model, parts_of
from deployments.desk import SAVE_S, Desk
from deployments.handles import answering, forever, translate
from deployments.remotes import UPSTREAM_BUILDER, Remotes
from serve_app.config import GatewayArgs, ModelArgs, UpstreamArgs, load, read_models
from serve_app.config.sources import PLATFORM
from serve_app.domain.catalog import LOCAL_PROVIDER, RESIDENT, Catalogue, Entry, ModelInfo, application_name
from serve_app.domain.errors import InvalidConfig, InvalidInput, RotundaError
from serve_app.domain.fleet import Fleet, FleetView, ProviderStatus, Report
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_events import CapacityChanged, Gone, Heartbeat, Registered, Tick
from serve_app.domain.rotation_view import HISTORY, RotationView, view_of
from serve_app.domain.routing import Admission, Ask, Granted, Lease, choose
from serve_app.domain.upstreams import UpstreamReport
from serve_app.engines import registry
from serve_app.engines.discovery import ModelStore
from serve_app.telemetry.figures import fleet_figures, rotation_figures, thresholds
from serve_app.telemetry.logs import set_up_logging
from serve_app.telemetry.metrics import Metric

logger = logging.getLogger(__name__)

AnyArgs = TypeVar("AnyArgs", ModelArgs, UpstreamArgs)

SCAN_S = 1.0
POLL_S = 2.0
LEASE_TTL_S = 2.0
MODEL_DEPLOYMENT = "model"
MODEL_BUILDER = "deployments.model:build"


class Router(Desk):
    """Holds the fleet's state: one writer, on one event loop.

    Args:
        args: the gateway application's arguments.
    """

    async def __init__(self, args: GatewayArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        set_up_logging()
        loaded = load(platform=args.platform_path() or PLATFORM, args=args.settings)
        self._settings, self._platform = loaded.settings, loaded.platform
        self.open_desk(self._settings)
        self._store = ModelStore(self._settings.hf_model_path, self._settings.hf_default_task)
        self._serve = ServeView(self._settings.ray_dashboard_address.get_secret_value())
        self._fleet = Fleet()
        self._remotes = Remotes(self._settings, self._platform)
        self._found: dict[str, ModelInfo] = {}
        self._deployed: dict[str, str] = {}
        """Applications that this router has put up for discovered models, each with the revision of its files."""
        self._deploying: dict[str, asyncio.Task[None]] = {}
        self._catalogue = Catalogue()
        self._defaults: dict[str, ModelArgs] = {}
        self._pinned: set[str] = set()
        """Models that an operator pinned since this router started, beside those whose arguments say so."""
        self._epoch = time.time_ns()
        self._nodes = Nodes(self._platform.capacity)
        self._rotation = Rotation(time.time())
        self._scanned = asyncio.Event()
        self.tracing.metrics.watch(self._figures)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(forever(self._look_at_store, SCAN_S)),
            loop.create_task(forever(self._look_at_serve, POLL_S)),
            loop.create_task(forever(self._look_at_nodes, POLL_S)),
            loop.create_task(forever(self.look_at_processes, SAVE_S)),
        ]

    @answering
    async def admit(self, ask: Ask) -> Admission:
        """The route of a request, with a lease on its first model; a discovered model is deployed on the way."""
        await self._scanned.wait()
        ask = self._with_fallbacks(ask)
        now = time.time()
        try:
            route = choose(ask, self._catalogue, self._fleet.at(now), self._settings.default_model)
        except RotundaError:
            # The newest folder or application may be a moment away; a wrong name is worth one look.
            await self._refresh()
            names = (ask.model or self._settings.default_model or "", *ask.fallbacks)
            catalogue = self._remotes.with_unlisted(self._catalogue, names, now)
            route = choose(ask, catalogue, self._fleet.at(now), self._settings.default_model)
        first = route.first
        if not first.resident:
            self._fleet.expect(first.entry.unit, now)
        for candidate in route.candidates:
            await self._deploy(candidate.entry)
        return Granted(route, Lease(first.entry.full_name, self._epoch, LEASE_TTL_S))

    async def cancel(self, ticket: str) -> None:
        """Forget a ticket. Every admission is granted at once as long as nothing rotates, so none is kept."""

    async def heartbeat(self, report: Report) -> bool:
        """A replica says how it is; the answer is whether its model is pinned."""
        entry = next((entry for entry in self._catalogue.entries if entry.application == report.application), None)
        self._fleet.hear(report, time.time(), entry.info.revision if entry and entry.info else "")
        if entry is not None:
            node = self._nodes.name_of(report.node)
            beat = Heartbeat(
                entry.full_name, report.replica_id, node, report.state, report.running, report.memory_bytes
            )
            self._rotation.handle(beat, time.time())
        return entry is not None and entry.full_name in self._pinned

    async def upstream_heartbeat(self, report: UpstreamReport) -> bool:
        """The replica of a remote provider says how it is; the answer says whether its models are known."""
        known = self._remotes.hear(report, self._fleet, time.time())
        self._rebuild()
        return known

    async def farewell(self, application: str, replica_id: str) -> None:
        """A replica ends; one that is killed is missed after ``REPORT_TTL_S``."""
        self._remotes.forget(application, replica_id)
        self._fleet.forget(application, replica_id)
        for entry in self._catalogue.entries:
            if entry.application == application and not entry.shared:
                self._rotation.handle(Gone(entry.full_name, replica_id), time.time())

    def _figures(self) -> Iterator[Metric]:
        """What the router alone knows, for ``/metrics``."""
        yield from fleet_figures(self._view())
        yield from rotation_figures(self._rotation_view(0))
        settings = self._settings
        yield thresholds(
            {
                "warning": settings.memory_warning_threshold,
                "cleanup": settings.memory_cleanup_threshold,
                "critical": settings.memory_critical_threshold,
            }
        )

    @answering
    async def view(self) -> FleetView:
        """What there is and how it is."""
        await self._scanned.wait()
        return self._view()

    def _view(self) -> FleetView:
        pinned = frozenset(entry.full_name for entry in self._catalogue.entries if self._is_pinned(entry))
        now = time.time()
        self._fleet.prune(now)
        return self._fleet.view(self._catalogue, now, pinned, self._providers(), self._serve.notes)

    @answering
    async def rotation(self, history: int = HISTORY) -> RotationView:
        """What holds memory, who waits, and the last decisions."""
        return self._rotation_view(history)

    def _rotation_view(self, history: int) -> RotationView:
        names = {entry.full_name: self._catalogue.name_of(entry) for entry in self._catalogue.entries}
        return view_of(self._rotation, time.time(), lambda name: names.get(name, name), history)

    @answering
    async def command(self, action: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """``load``, ``unload``, ``pin`` or ``plan`` a model by name."""
        await self._scanned.wait()
        entry = self._catalogue.resolve(model)
        if action == "plan":
            return {"model": self._catalogue.name_of(entry), **await self._plan(entry)}
        if action == "load":
            await self._load(entry, model)
        elif action == "unload":
            await self._unload(entry)
        elif action == "pin":
            change = self._pinned.add if arguments.get("pinned", True) else self._pinned.discard
            change(entry.full_name)
        else:
            raise InvalidInput(f"There is no command {action!r}; the commands are load, unload, pin and plan.")
        state, reason = self._fleet.state_of(entry, time.time())
        return {"model": self._catalogue.name_of(entry), "state": state.value, "reason": reason}

    async def _plan(self, entry: Entry) -> dict[str, Any]:
        if self._fleet.state_of(entry, time.time())[0] in RESIDENT:
            return {"verdict": "resident", "reason": "it is in memory"}
        if entry.shared:
            return {"verdict": "fits", "reason": f"{entry.provider} makes room for it by itself"}
        plan = self._rotation.plan(entry.full_name).to_json()
        parts = await asyncio.to_thread(parts_of, self._args_of(entry), entry.info)
        return {**plan, "model": self._catalogue.name_of(entry), "bytes": parts}

    async def _load(self, entry: Entry, name: str) -> None:
        choose(Ask("load", name, frozenset()), self._catalogue, self._fleet.at(time.time()))
        await self._deploy(entry)
        self._fleet.expect(entry.unit, time.time())
        self._wake(entry)

    async def _unload(self, entry: Entry) -> None:
        if self._is_pinned(entry):
            raise InvalidInput(f"{entry.id} is pinned: it stays in memory until it is unpinned.", entry.provider)
        await self._retire(entry)

    def _is_pinned(self, entry: Entry) -> bool:
        return entry.full_name in self._pinned or (not entry.shared and self._args_of(entry).stays)

    def _args_of(self, entry: Entry) -> ModelArgs:
        declared = self._serve.models.get(entry.application)
        return declared or ModelArgs(model=entry.id).over(self._defaults.get(entry.id))

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _look_at_store(self) -> None:
        await self._scan()
        self._scanned.set()

    async def _look_at_serve(self) -> None:
        await self._serve.poll()
        if not self._serve.notes:
            await self._remotes.look(self._serve.upstreams, self._serve.running)
        self._rebuild()

    async def _look_at_nodes(self) -> None:
        if self._nodes.look(await asyncio.to_thread(ray.nodes)):
            self._rotation.handle(CapacityChanged(LOCAL_PROVIDER, self._nodes.nodes), time.time())
        self._rotation.handle(Tick(), time.time())

    async def _refresh(self) -> None:
        await asyncio.gather(self._look_at_store(), self._look_at_serve())

    async def _scan(self) -> None:
        infos = await asyncio.to_thread(self._store.scan, time.time())
        self._defaults = await asyncio.to_thread(self._read_defaults)
        self._found = {info.id: info for info in infos}
        self._rebuild()
        for application, revision in list(self._deployed.items()):
            info = next((info for info in infos if application_name(info.id) == application), None)
            if info is None or (info.revision != revision and not self._busy(application)):
                self._deployed.pop(application)
                logger.info("%s %s: its application goes", application, "changed" if info else "is gone")
                await asyncio.to_thread(serve.delete, application, _blocking=False)

    def _busy(self, application: str) -> bool:
        return any(report.running or report.waiting for report in self._fleet.of(application, time.time()))

    def _rebuild(self) -> None:
        """The catalogue from what is declared and what was found; a declared model wins over its folder."""
        declared = {args.model: (name, args) for name, args in self._serve.models.items()}
        entries = [_declared_entry(name, args, self._found.get(args.model)) for name, args in declared.values()]
        entries += [_found_entry(info) for info in self._found.values() if info.id not in declared]
        entries += self._remotes.entries(time.time())
        aliases = dict(self._platform.aliases)
        for args in (*self._defaults.values(), *self._serve.models.values()):
            aliases |= dict.fromkeys(args.aliases, args.model)
        self._catalogue = Catalogue(entries, aliases)
        for entry in self._catalogue.entries:
            if not entry.shared:
                self._rotation.handle(Registered(local_model(entry, self._args_of(entry))), time.time())

    def _providers(self) -> tuple[ProviderStatus, ...]:
        local = [entry for entry in self._catalogue.entries if not entry.shared]
        usable = sum(1 for entry in local if entry.info is None or entry.info.usable)
        return (ProviderStatus(LOCAL_PROVIDER, LOCAL_PROVIDER, "ok", usable), *self._remotes.statuses(time.time()))

    def _with_fallbacks(self, ask: Ask) -> Ask:
        """The request's own fallbacks, else those that the platform file gives its model."""
        known = self._platform.fallbacks.get(ask.model or self._settings.default_model or "", ())
        return ask if ask.fallbacks or not known else replace(ask, fallbacks=known)

    async def _deploy(self, entry: Entry) -> None:
        """Put up the application of a discovered model unless it stands; concurrent callers share one deployment."""
        known = entry.application in self._deployed or entry.application in self._serve.running
        if entry.declared or entry.shared or known:
            return
        task = self._deploying.get(entry.application)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._put_up(entry))
            self._deploying[entry.application] = task
            task.add_done_callback(lambda done: self._deploying.pop(entry.application, None))
        await asyncio.shield(task)

    async def _put_up(self, entry: Entry) -> None:
        target = RunTarget(model_deployment.build(self._args_of(entry)), name=entry.application, route_prefix=None)
        try:
            await asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False)
        except Exception as error:
            logger.exception("%s could not be deployed", entry.id)
            raise translate(error, entry.id, entry.provider) from error
        self._deployed[entry.application] = entry.info.revision if entry.info else ""
        logger.info("%s was deployed as %s", entry.id, entry.application)

    def _read_defaults(self) -> dict[str, ModelArgs]:
        """The files in ``configs/models``; a wrong one is reported and leaves the last good ones in force."""
        try:
            return read_models(self._settings.rotunda_home / "configs" / "models")
        except InvalidConfig as error:
            logger.error("the defaults of discovered models stay as they were: %s", error)
            return self._defaults

    def _wake(self, entry: Entry) -> None:
        if entry.shared:
            self._keep(asyncio.ensure_future(self._remotes.command("load", entry)))
            return
        handle: DeploymentHandle[Any] = DeploymentHandle(entry.deployment, entry.application)
        self._keep(asyncio.ensure_future(handle.warm.remote()))

    async def _retire(self, entry: Entry) -> None:
        if entry.shared:
            await self._remotes.command("unload", entry)
            return
        handle: DeploymentHandle[Any] = DeploymentHandle(entry.deployment, entry.application)
        await handle.broadcast("retire").results_async(timeout_s=5)

    def _keep(self, future: asyncio.Future[Any]) -> None:
        """Hold a reference to a call that nobody waits for, and log how it failed."""

        def done(finished: asyncio.Future[Any]) -> None:
            if not finished.cancelled() and finished.exception() is not None:
                logger.warning("a load failed: %r", finished.exception())

        future.add_done_callback(done)


class ServeView:
    """What Serve's REST API says of the applications: which models are declared, and what runs.

    Args:
        address: of Ray's dashboard.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: ServeSubmissionClient | None = None
        self.models: dict[str, ModelArgs] = {}
        self.upstreams: dict[str, UpstreamArgs] = {}
        self.running: frozenset[str] = frozenset()
        self.notes: tuple[str, ...] = ("Serve's REST API was not asked yet.",)

    async def poll(self) -> None:
        """Ask once; what was known stays when there is no answer, and the notes say so."""
        try:
            details = await asyncio.to_thread(self._fetch)
        except Exception as error:
            self.notes = (f"Serve's REST API at {self._address} does not answer; the models are those last seen.",)
            logger.warning("Serve's REST API does not answer: %r", error)
            return
        self.notes = ()
        applications: dict[str, Any] = details.get("applications") or {}
        self.running = frozenset(applications)
        self.models = {name: args for name, app in applications.items() if (args := _model_args(name, app))}
        self.upstreams = {
            name: found
            for name, app in applications.items()
            if (found := _declared_args(name, app, UPSTREAM_BUILDER, UpstreamArgs))
        }

    def _fetch(self) -> dict[str, Any]:
        if self._client is None:
            self._client = ServeSubmissionClient(self._address)
        return dict(self._client.get_serve_details())


def _declared_args(name: str, application: dict[str, Any], builder: str, kind: type[AnyArgs]) -> AnyArgs | None:
    """The arguments of an application that stands in ``serve_config.yaml`` with this builder; else None."""
    config = application.get("deployed_app_config") or {}
    if config.get("import_path") != builder or application.get("status") == "DELETING":
        return None
    try:
        return kind.read(config.get("args"), name)
    except InvalidConfig as error:
        logger.warning("%s", error)
        return None


def _model_args(name: str, application: dict[str, Any]) -> ModelArgs | None:
    """The arguments of a declared model application; None for every other one."""
    args = _declared_args(name, application, MODEL_BUILDER, ModelArgs)
    if args is None:
        return None
    config = application["deployed_app_config"]
    overrides = [item for item in config.get("deployments") or () if item.get("name") == MODEL_DEPLOYMENT]
    scaling = (overrides[0].get("autoscaling_config") or {}) if overrides else {}
    known = {key: scaling[key] for key in ("min_replicas", "max_replicas") if scaling.get(key) is not None}
    return args.model_copy(update=known)


def _declared_entry(application: str, args: ModelArgs, found: ModelInfo | None) -> Entry:
    info = registry.describe(args.engine, args.model) or found
    missing = None if info else f"its folder is not in the model store ({args.model})"
    info = info or ModelInfo(args.model, "", problem=missing, problem_code="MODEL_NOT_FOUND")
    spec = args.model_dump(mode="json", exclude_unset=True)
    return Entry(args.model, LOCAL_PROVIDER, application, MODEL_DEPLOYMENT, info, declared=True, spec=spec)


def _found_entry(info: ModelInfo) -> Entry:
    return Entry(info.id, LOCAL_PROVIDER, application_name(info.id), MODEL_DEPLOYMENT, info)
