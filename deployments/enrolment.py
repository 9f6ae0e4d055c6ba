"""Keeps the rotation in step with what is offered: models, the places where they land, and who cannot be reached."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from deployments.capacity import Nodes
from deployments.demand import local_model, remote_model
from deployments.offer import Offer
from serve_app.config import Settings
from serve_app.domain.catalog import LOCAL_PROVIDER, Entry
from serve_app.domain.placement import Node, Resources
from serve_app.domain.planning import Verdict
from serve_app.domain.rotation_events import (
    CapacityChanged,
    Gone,
    Heartbeat,
    Model,
    ProviderDown,
    ProviderUp,
    Recalled,
    Registered,
    Unload,
    Unregistered,
)
from serve_app.domain.upstreams import resident_reports
from serve_app.rotor import Rotor

logger = logging.getLogger(__name__)

JUST_MOVED_S = 3.0
"""A server's list of what is in its memory may be so old."""


class Enrolment:
    """See the module.

    Args:
        offer: what there is.
        rotor: hears of it.
        settings: whether the number of models is capped.
        nodes: the cluster's.
        recalled: what an earlier router learned of each model, by full name.
    """

    def __init__(
        self,
        offer: Offer,
        rotor: Rotor,
        settings: Settings,
        nodes: Nodes,
        recalled: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._offer = offer
        self._rotor = rotor
        self._counted = settings.max_concurrent_models > 0
        self._nodes = nodes
        self._recalled = dict(recalled)
        self._models: dict[str, Model] = {}
        self._pools: dict[str, Node] = {}
        self._down: dict[str, str] = {}
        self._giants: set[str] = set()

    def models(self) -> None:
        """Tell of models that are new, changed or gone. One whose files changed is loaded anew."""
        offered = {entry.full_name: self._model(entry) for entry in self._offer.catalogue.entries}
        for name in self._models.keys() - offered.keys():
            self._rotor.tell(Unregistered(name))
        for name, model in offered.items():
            before = self._models.get(name)
            if before == model:
                continue
            self._rotor.tell(Registered(model))
            if name in self._recalled:
                self._rotor.tell(Recalled(name, self._recalled.pop(name)))
            if before is not None and before.revision and before.revision != model.revision:
                self._rotor.tell(Unload(name, "its files have changed"))
        self._models = offered
        self._look_for_giants()

    def nodes(self) -> None:
        """Tell where local models may land now."""
        self._rotor.tell(CapacityChanged(LOCAL_PROVIDER, self._nodes.nodes))
        self._look_for_giants()

    def _look_for_giants(self) -> None:
        """Log which declared models can never be loaded here, once each: their requests will all be refused."""
        declared = {entry.full_name for entry in self._offer.catalogue.entries if entry.declared and not entry.shared}
        plans = [self._rotor.rotation.plan(name) for name in declared & self._models.keys()]
        giants = {plan.model: plan.reason for plan in plans if plan.verdict is Verdict.NEVER}
        for name in giants.keys() - self._giants:
            logger.error("%s", giants[name])
        self._giants = set(giants)

    def remotes(self) -> None:
        """Tell of the remote providers: which cannot be reached, and the memory of those that say what is in it."""
        now = time.time()
        down = {name: reason for name, reason in self._offer.remotes.problems(now).items() if reason}
        for name in self._down.keys() - down.keys():
            self._rotor.tell(ProviderUp(name))
        for name, reason in down.items():
            if self._down.get(name) != reason:
                self._rotor.tell(ProviderDown(name, reason))
        self._down = down
        for name, budget in self._offer.remotes.budgets(now).items():
            node = Node(name, Resources(math.inf, math.inf, budget or math.inf), name)
            if self._pools.get(name) != node:
                self._pools[name] = node
                self._rotor.tell(CapacityChanged(name, (node,)))

    def residents(self, application: str) -> None:
        """Tell what is in the memory of a remote provider, as its replicas just said."""
        rows, residents = self._rotor.rotation.state.residency.rows, self._rotor.rotation.state.residency.residents
        now = time.time()
        entries = [entry for entry in self._offer.by_name.values() if entry.application == application]
        for entry in entries:
            row = rows.get(entry.full_name)
            if row is None or not row.model.resides:
                continue
            resident = residents.get(entry.full_name)
            report = resident_reports(self._offer.remotes.reports(application, now), entry)
            if resident is None and self._rotor.now - row.left_at <= JUST_MOVED_S:
                continue
            if report is not None:
                beat = Heartbeat(
                    entry.full_name, application, entry.provider, report.state, report.running, report.memory_bytes
                )
                self._rotor.tell(beat)
            elif resident is not None and self._rotor.now - (resident.loaded_at or math.inf) > JUST_MOVED_S:
                self._rotor.tell(Gone(entry.full_name, application))

    def _model(self, entry: Entry) -> Model:
        if not entry.shared:
            return local_model(entry, self._offer.args_of(entry))
        budgets = self._offer.remotes.budgets(time.time())
        resides = entry.provider in budgets and (self._counted or budgets[entry.provider] is not None)
        return remote_model(entry, resides)
