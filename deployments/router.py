"""The router: one replica that knows every model, hears every replica, and says who may answer.

Everything it hears becomes an event of one rotation (docs/rotation.md), which decides; what is decided is carried out
by ``deployments.effects``. What there is at all, it learns from ``deployments.offer``.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray

from deployments.applications import Applications
from deployments.capacity import Nodes
from deployments.commands import Commands
from deployments.desk import SAVE_S, Desk
from deployments.effects import Effects
from deployments.enrolment import Enrolment
from deployments.handles import answering, forever
from deployments.offer import Offer
from deployments.recollection import MODEL, Recollection
from deployments.replicas import Replicas
from deployments.states import States
from serve_app.config import GatewayArgs, Settings, load
from serve_app.config.sources import PLATFORM
from serve_app.domain.catalog import ModelState
from serve_app.domain.errors import RotundaError, error_from_dict
from serve_app.domain.fleet import Fleet, FleetView, Report
from serve_app.domain.leasing import Orders, Permit
from serve_app.domain.leasing import Report as HolderReport
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_effects import Grant, Notify, Refuse
from serve_app.domain.rotation_events import Limits, MemoryMeasured, Request
from serve_app.domain.rotation_view import HISTORY, RotationView, view_of
from serve_app.domain.routing import Admission, Ask, Granted, Route, Waiting, choose
from serve_app.domain.upstreams import UpstreamReport
from serve_app.engines.memory import node_memory
from serve_app.rotor import Rotor
from serve_app.telemetry.figures import fleet_figures, rotation_figures, thresholds
from serve_app.telemetry.logs import set_up_logging
from serve_app.telemetry.metrics import Metric

logger = logging.getLogger(__name__)

SCAN_S = 1.0
SCAN_REST = 20
"""After a look at the model store the router rests for so many times as long as that took: a store with hundreds of
models must not keep a processor busy."""
POLL_S = 2.0
FIRST_LOOKS, FIRST_LOOK_S = 10, 0.5
"""How often, and with which pauses, a router that starts asks Serve what is declared, until it is answered."""
ASK_AGAIN_S = 2.0
"""A waiting gateway asks again after so long even when it heard no news."""
FRESH_S = 2.5
"""Serve counts a request that waited in a handle for so long: its look-back period, a push and a round of its loop."""
ECHO_S = 1.6
"""So long it counts one that had to be routed just before the leases were revoked, for the same reasons."""
SILENCE_S = 30.0
"""A replica that has said nothing for so long is gone; one that ended is missed sooner: Serve lists it no more."""
TICKET_TTL_S = 15.0
"""Who has not asked after a request for so long has gone."""


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
        self._offer = Offer(self._settings, self._platform)
        self._nodes = Nodes(self._platform.capacity)
        self._node_id = str(ray.get_runtime_context().get_node_id())
        self._fleet = Fleet()
        self._recollection = Recollection(self._settings)
        recalled, *_ = await asyncio.gather(
            self._recollection.recall(),
            self._offer.look_at_store(),
            self._first_look_at_serve(),
            self._look_at_nodes(),
        )
        self._offer.removed = frozenset(recalled.get("removed") or ())
        self._offer.rebuild()
        clock = _steady_clock()
        self._generation = max(int(recalled.get("generation") or 0) + 1, int(time.time()))
        rotation = Rotation(clock(), _limits(self._settings), generation=self._generation)
        self._applications = Applications(self._platform.max_deployed, self._platform.keep_deployed_s, clock)
        self._rotor = Rotor(rotation, lambda effect: self._effects(effect), clock)
        self._effects = Effects(
            self._offer, self._applications, self._rotor.tell, self._has_replica, self.tracing.metrics.evicted
        )
        learned = self._recollection.of_models()
        self._enrolment = Enrolment(self._offer, self._rotor, self._settings, self._nodes, learned)
        self._replicas = Replicas(self._offer, self._rotor, self._fleet, self._nodes.name_of)
        self._commands = Commands(self._offer, self._rotor, self._states, self._rebuild)
        for name, revision in (recalled.get("applications") or {}).items():
            if name in self._offer.serve.running:
                self._applications.take_over(name, revision)
        self._offer.remotes.standing |= recalled.get("upstreams") or {}
        self._enrolment.nodes()
        self._enrolment.remotes()
        self._enrolment.models()
        self._enrolled = True
        """Whether the rotation has heard of the present catalogue: a fault on the way must not leave it half told."""
        self._rotor.start()
        self.tracing.metrics.watch(self._figures)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(forever(self._watch_store, SCAN_S)),
            loop.create_task(forever(self._look_at_serve, POLL_S)),
            loop.create_task(forever(self._remember, POLL_S)),
            loop.create_task(forever(self.look_at_processes, SAVE_S)),
        ]

    @answering
    async def admit(self, ask: Ask) -> Admission:
        """May the request run now, and where? A request that waits asks again with the same ticket."""
        try:
            route = await self._route(self._with_fallbacks(ask))
        except RotundaError:
            self._rotor.cancel(ask.ticket)
            raise
        models = tuple(candidate.entry.full_name for candidate in route.candidates)
        asked_at = self._rotor.now - ask.waited_s
        answer = self._rotor.ask(Request(ask.ticket, models, ask.holder, ask.priority, ask.caller, asked_at))
        match answer:
            case Grant():
                lease = answer.lease
                assert lease is not None, "every request of a gateway gets a lease"
                return Granted(_from(route, answer, self._offer.name_of(answer.model)), lease)
            case Refuse():
                raise error_from_dict(answer.error)
            case Notify():
                return self._waiting(route, answer)

    async def cancel(self, ticket: str) -> None:
        """The caller of a waiting request has left."""
        self._rotor.cancel(ticket)

    async def sync(self, report: HolderReport) -> Orders:
        """A gateway says which leases it uses and gives up; it hears what it must stop, and of its waiting requests."""
        return await self._rotor.sync(report)

    async def may_load(self, application: str) -> Permit:
        """A replica that has just started asks whether it may load its model."""
        return self._replicas.may_load(application)

    async def heartbeat(self, report: Report) -> Permit | None:
        """A replica says how it is, and hears how many of its kind there may be; None: the model is not known."""
        return self._replicas.heard(report)

    async def upstream_heartbeat(self, report: UpstreamReport) -> bool:
        """The replica of a remote provider says how it is; the answer says whether its models are known."""
        known = self._offer.remotes.hear(report, self._fleet, time.time())
        self._rebuild()
        self._enrolment.residents(report.application)
        return known

    async def farewell(self, application: str, replica_id: str) -> None:
        """A replica ends; one that is killed is missed when Serve lists it no more, or its reports stop."""
        self._offer.remotes.forget(application, replica_id)
        self._replicas.gone(application, replica_id)

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
        return self._view()

    def _view(self) -> FleetView:
        now = time.time()
        self._fleet.prune(now)
        rotation = self._rotor.rotation
        pinned = frozenset(name for name, row in rotation.state.residency.rows.items() if row.pinned)
        notes = (*self._offer.serve.notes, *filter(None, (self._recollection.note,)))
        providers = self._offer.statuses(now)
        return self._fleet.view(self._offer.catalogue, now, pinned, providers, notes, self._states())

    @answering
    async def rotation(self, history: int = HISTORY) -> RotationView:
        """What holds memory, who waits, and the last decisions."""
        return self._rotation_view(history)

    def _rotation_view(self, history: int) -> RotationView:
        removed = tuple(sorted(self._offer.removed))
        counts = dict(self._effects.counts)
        return view_of(self._rotor.rotation, self._rotor.now, self._offer.name_of, history, removed, counts)

    @answering
    async def command(self, action: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`serve_app.backend.Router.command`."""
        return await self._commands.run(action, model, arguments)

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._rotor.stop()
        self._effects.close()
        await self._recollection.close()

    async def _route(self, ask: Ask) -> Route:
        try:
            return choose(ask, self._offer.catalogue, self._states(), self._settings.default_model)
        except RotundaError:
            # The newest folder or application may be a moment away; a wrong name is worth one look.
            await asyncio.gather(self._look_at_store(), self._look_at_serve())
            names = (ask.model or self._settings.default_model or "", *ask.fallbacks)
            catalogue = self._offer.remotes.with_unlisted(self._offer.catalogue, names, time.time())
            return choose(ask, catalogue, self._states(), self._settings.default_model)

    def _states(self) -> States:
        return States(self._rotor.rotation, self._fleet, time.time())

    def _with_fallbacks(self, ask: Ask) -> Ask:
        """The request's own fallbacks, else those that the platform file gives its model."""
        known = self._platform.fallbacks.get(ask.model or self._settings.default_model or "", ())
        return ask if ask.fallbacks or ask.alone or not known else replace(ask, fallbacks=known)

    def _waiting(self, route: Route, told: Notify) -> Waiting:
        name_of = self._offer.name_of
        return Waiting(
            told.ticket,
            route,
            told.position,
            told.reason,
            None if told.eta_s is None else round(1000 * told.eta_s),
            name_of(told.model) if told.loading else None,
            tuple(name_of(victim) for victim in told.evicting),
            ASK_AGAIN_S,
        )

    def _has_replica(self, application: str) -> bool:
        loaded = (ModelState.READY, ModelState.BUSY, ModelState.FAILED)
        return any(report.state in loaded for report in self._fleet.of(application, time.time()))

    def _rebuild(self) -> None:
        if self._offer.rebuild():
            self._rotor.catalogue += 1
            self._enrolled = False
        if not self._enrolled:
            self._enrolment.models()
            self._enrolled = True
        self._enrolment.remotes()

    async def _watch_store(self) -> None:
        began = time.monotonic()
        await self._look_at_store()
        await asyncio.sleep(max(0.0, SCAN_REST * (time.monotonic() - began) - SCAN_S))

    async def _look_at_store(self) -> None:
        await self._offer.look_at_store()
        self._rebuild()

    async def _first_look_at_serve(self) -> None:
        """Which models are declared must be known before the first request: unknown ones would be refused, and those
        that are in the store as well be taken for discovered ones. A dashboard that stays away is not waited for."""
        for _ in range(FIRST_LOOKS):
            if await self._offer.look_at_serve():
                return
            await asyncio.sleep(FIRST_LOOK_S)

    async def _look_at_serve(self) -> None:
        asked_at = time.time()
        answered = await self._offer.look_at_serve()
        self._rebuild()
        if answered:
            self._replicas.compare(self._offer.serve.replicas, asked_at)
            await self._sweep()
        for model in self._replicas.unattended(self._effects.loading):
            self._effects.load(model)
        if await self._look_at_nodes():
            self._enrolment.nodes()
        used, total = await asyncio.to_thread(node_memory)
        self._rotor.tell(MemoryMeasured(self._nodes.name_of(self._node_id), used, total))

    async def _remember(self) -> None:
        """Keep what a later router should know."""
        rotation = self._rotor.rotation
        learned = {f"{MODEL}{name}": rotation.learned(name) for name in rotation.state.residency.rows}
        await self._recollection.keep(
            {
                **{key: value for key, value in learned.items() if value or self._recollection.knows(key)},
                "generation": self._generation,
                "removed": sorted(self._offer.removed),
                "applications": dict(self._applications.standing),
                "upstreams": dict(self._offer.remotes.standing),
            }
        )

    async def _look_at_nodes(self) -> bool:
        return self._nodes.look(await asyncio.to_thread(ray.nodes))

    async def _sweep(self) -> None:
        offer = self._offer
        revisions = {
            entry.application: entry.info.revision if entry.info else ""
            for entry in offer.by_application.values()
            if not entry.declared
        }
        await self._applications.sweep(revisions, self._replicas.is_cold)


def _steady_clock() -> Callable[[], float]:
    """Seconds since the epoch that never jump: a later router's times go on where this one's ended."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset


def _limits(settings: Settings) -> Limits:
    return Limits(
        enabled=settings.model_rotation_enabled,
        max_queue=settings.max_queue_size,
        max_wait_s=settings.rotation_timeout_ms / 1000,
        load_timeout_s=settings.hf_load_timeout_ms / 1000,
        max_local_models=settings.hf_max_cached_models,
        max_models=settings.max_concurrent_models,
        fresh_s=FRESH_S,
        echo_s=ECHO_S,
        silence_s=SILENCE_S,
        ticket_ttl_s=TICKET_TTL_S,
        retry_attempts=settings.rotation_retry_attempts,
        retry_delay_s=settings.rotation_retry_delay_ms / 1000,
        warning=settings.memory_warning_threshold,
        cleanup=settings.memory_cleanup_threshold,
        critical=settings.memory_critical_threshold,
    )


def _from(route: Route, grant: Grant, name: str) -> Route:
    """The route from the granted model on; those before it are passed over, for the reason that the grant gives."""
    rank = next((i for i, one in enumerate(route.candidates) if one.entry.full_name == grant.model), 0)
    first = route.candidates[rank]
    before = tuple((candidate.name, grant.reason) for candidate in route.candidates[:rank])
    granted = first if first.resident else replace(first, state=ModelState.READY)
    candidates = (granted, *route.candidates[rank + 1 :])
    return replace(route, candidates=candidates, passed_over=(*route.passed_over, *before))
