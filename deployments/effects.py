"""Carries out what the rotation decided: replicas come by a call, and leave by being told to."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError

from deployments.applications import Applications
from deployments.demand import demand_of
from deployments.handles import Failure, translate
from deployments.lines import Lines
from deployments.offer import Offer
from serve_app.domain.catalog import Entry, ModelState
from serve_app.domain.errors import ModelNotFound, error_from_dict
from serve_app.domain.rotation_effects import Effect, Load, Log, Retire
from serve_app.domain.rotation_events import Event, Gone, Heartbeat, LoadFailed
from serve_app.telemetry.figures import departure

logger = logging.getLogger(__name__)

AGAIN_S = 0.2
"""Pause after a load was answered by a replica that is leaving."""
RETIRE_TIMEOUT_S = 5.0


class Effects:
    """See the module. Every effect is carried out in a task of its own; what comes of it is told as an event.

    Args:
        offer: finds the application and arguments of a model.
        applications: of discovered models.
        tell: takes the events.
        loaded: whether a replica of an application has come up, by what was last heard.
        evicted: counts a model that leaves, with the kind of the reason.
    """

    def __init__(
        self,
        offer: Offer,
        applications: Applications,
        tell: Callable[[Event], None],
        loaded: Callable[[str], bool],
        evicted: Callable[[str, str], None] = lambda model, why: None,
    ) -> None:
        self._offer = offer
        self._applications = applications
        self._tell = tell
        self._loaded = loaded
        self._evicted = evicted
        self._lines = Lines()
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()
        """How often each kind of thing was logged."""

    def __call__(self, effect: Effect) -> None:
        match effect:
            case Load():
                self.load(effect.model)
            case Retire():
                self.abandon(effect.model)
                self._evicted(effect.model.partition("/")[2], departure(effect.reason))
                self._spawn(self._retire(effect))
            case Log():
                self.counts[effect.kind] += 1
                logger.log(logging.getLevelNamesMapping()[effect.level.upper()], "%s", effect.text)

    @property
    def loading(self) -> set[str]:
        """The models for which a call waits until they are loaded."""
        return set(self._loads)

    def load(self, model: str) -> None:
        """Have the first replica of a model started."""
        task = self._spawn(self._load(model))
        self._loads[model] = task
        task.add_done_callback(lambda done: self._loads.pop(model) if self._loads.get(model) is done else None)

    def abandon(self, model: str) -> None:
        """Stop waiting for a load; without the call that waits, Serve wants no replica any more."""
        task = self._loads.pop(model, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _load(self, model: str) -> None:
        entry = self._offer.by_name.get(model)
        if entry is None:
            error = ModelNotFound(f"There is no model called {model!r} any more.")
            self._tell(LoadFailed(model, error.to_dict()))
            self._tell(Gone(model))
            return
        try:
            await (self._load_remote(entry) if entry.shared else self._load_local(entry))
        except Exception as error:
            failure = translate(error, entry.id, entry.provider)
            logger.warning("%s could not be loaded: %s (%r)", model, failure, error)
            self._tell(LoadFailed(model, failure.to_dict()))
            if entry.shared:
                self._tell(Gone(model))

    async def _load_local(self, entry: Entry) -> None:
        if not entry.declared:
            args = self._offer.args_of(entry)
            memory = await asyncio.to_thread(demand_of, args, entry.info)
            update = {"memory_bytes": int(memory.memory) or None}
            await self._applications.put_up(entry, args.model_copy(update=update))
        try:
            answer = await self._warm(entry)
        except DeploymentUnavailableError:  # the handle was to an application that has been put up anew since
            answer = await self._warm(entry)
        if isinstance(answer, Failure):
            raise error_from_dict(answer.error)

    async def _warm(self, entry: Entry) -> Any:
        """Have Serve start a replica; returns once it is loaded."""
        with self._lines.calling(entry) as handle:
            while True:
                answer = await handle.warm.remote()
                if answer is not False:
                    return answer
                await asyncio.sleep(AGAIN_S)

    async def _load_remote(self, entry: Entry) -> None:
        await self._offer.remotes.command("load", entry)
        self._tell(Heartbeat(entry.full_name, entry.application, entry.provider, ModelState.READY))

    async def _retire(self, effect: Retire) -> None:
        entry = self._offer.find(effect.model)
        if entry is None:
            return
        try:
            if entry.shared:
                await self._offer.remotes.command("unload", entry)
                self._tell(Gone(effect.model))
            elif self._loaded(entry.application):
                # Only replicas that run hear a broadcast; a call to a model without any would wake it.
                with self._lines.calling(entry) as handle:
                    await handle.broadcast("retire", effect.epoch).results_async(timeout_s=RETIRE_TIMEOUT_S)
        except Exception as error:
            # The answers to their heartbeats say the same.
            logger.warning("%s was not told to leave: %r", effect.model, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
