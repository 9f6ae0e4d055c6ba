"""What the router keeps in the store so that the one after it knows: pins, sizes, load times, failures, the pool."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from serve_app.config import Settings
from serve_app.domain.errors import RotundaError
from serve_app.store import migrate
from serve_app.store.store import Store

logger = logging.getLogger(__name__)


MODEL = "model:"
"""Keys of what was learned of one model begin so, and end with its full name."""


class Recollection:
    """Values by key, written when they change. A store that is away is no reason not to rotate: it is tried again.

    Args:
        settings: where the store is.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store: Store | None = None
        self._known: dict[str, Any] = {}
        self.note: str | None = None
        """What is wrong with the store, in plain words."""

    def of_models(self) -> dict[str, Any]:
        """What was learned of each model, by full name."""
        return {key.removeprefix(MODEL): value for key, value in self._known.items() if key.startswith(MODEL)}

    async def recall(self) -> dict[str, Any]:
        """What was written by earlier routers; empty when the store does not answer."""
        try:
            self._known = await (await self._open()).recall_fleet()
            self.note = None
        except RotundaError as error:
            self._complain(error)
        return dict(self._known)

    def knows(self, key: str) -> bool:
        """Whether anything is written under a key."""
        return key in self._known

    async def keep(self, values: Mapping[str, Any]) -> None:
        """Write what has changed since the last time; None forgets a key."""
        changes = {key: value for key, value in values.items() if self._known.get(key) != value}
        if not changes:
            return
        try:
            await (await self._open()).remember_fleet(changes)
        except RotundaError as error:
            self._complain(error)
            return
        self.note = None
        self._known |= changes

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()

    async def _open(self) -> Store:
        if self._store is None:
            url = self._settings.database_url.get_secret_value()
            if self._settings.database_auto_migrate or url.startswith("sqlite"):
                await asyncio.to_thread(migrate.upgrade, url)
            self._store = await Store.open(url)
        return self._store

    def _complain(self, error: RotundaError) -> None:
        if self.note is None:
            logger.warning("what the router learns is not kept: %s", error)
        self.note = f"What the router learns is not kept: {error.message}"
