"""The Serve applications that the router puts up for discovered models, and takes away again."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from ray import serve
from ray.serve import RunTarget

from deployments import model
from deployments.handles import translate
from serve_app.config import ModelArgs
from serve_app.domain.catalog import Entry

logger = logging.getLogger(__name__)


class Applications:
    """One application per discovered model in use; each costs Serve's controller something all the time.

    Args:
        most: so many may stand; the coldest go first.
        keep_s: a cold one goes after so many seconds.
        clock: seconds.
    """

    def __init__(self, most: int, keep_s: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._keep_s = keep_s
        self._clock = clock
        self.standing: dict[str, str] = {}
        """By name, with the revision of the files that each was put up for."""
        self._cold_since: dict[str, float] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"Applications({', '.join(sorted(self.standing))})"

    def take_over(self, name: str, revision: str) -> None:
        """An earlier router put this one up."""
        self.standing.setdefault(name, revision)

    async def put_up(self, entry: Entry, args: ModelArgs) -> None:
        """Put up the application of a model unless it stands; concurrent callers share one deployment.

        Raises:
            RotundaError: Serve refused it.
        """
        if entry.application in self.standing:
            return
        task = self._under_way.get(entry.application)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._deploy(entry, args))
            self._under_way[entry.application] = task
            task.add_done_callback(lambda done: self._under_way.pop(entry.application, None))
        await asyncio.shield(task)

    async def sweep(self, revisions: Mapping[str, str], cold: Callable[[str], bool]) -> list[str]:
        """Take down what is not offered any more, what changed, what was cold for long, and the coldest of too many.

        Args:
            revisions: of the files of each application that may stand.
            cold: whether nothing of an application is in memory or wanted there.

        Returns:
            The applications that went.
        """
        now, reasons = self._clock(), {}
        for name, revision in self.standing.items():
            if not cold(name):
                self._cold_since.pop(name, None)
                continue
            since = self._cold_since.setdefault(name, now)
            if revisions.get(name) != revision:
                reasons[name] = "its files have changed" if name in revisions else "its folder is gone"
            elif now - since >= self._keep_s:
                reasons[name] = f"it was cold for {self._keep_s:g} s"
        staying = [name for name in self.standing if name not in reasons]
        coldest = sorted((name for name in staying if name in self._cold_since), key=self._cold_since.__getitem__)
        for name in coldest[: max(0, len(staying) - self._most)]:
            reasons[name] = f"more than {self._most} applications stand"
        for name, reason in reasons.items():
            logger.info("the application %s goes: %s", name, reason)
            self.standing.pop(name)
            self._cold_since.pop(name, None)
            await asyncio.to_thread(serve.delete, name, _blocking=False)
        return list(reasons)

    async def _deploy(self, entry: Entry, args: ModelArgs) -> None:
        target = RunTarget(model.build(args), name=entry.application, route_prefix=None)
        try:
            await asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False)
        except Exception as error:
            logger.exception("%s could not be deployed", entry.id)
            raise translate(error, entry.id, entry.provider) from error
        self.standing[entry.application] = entry.info.revision if entry.info else ""
        logger.info("%s was deployed as %s", entry.id, entry.application)
