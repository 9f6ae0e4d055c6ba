"""What a gateway stands on: the router that decides, and the models that answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from serve_app.domain.catalog import Entry
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.fleet import FleetView
from serve_app.domain.generation import GenerationRequest, Item
from serve_app.domain.leasing import Orders, Report
from serve_app.domain.rotation_view import HISTORY, RotationView
from serve_app.domain.routing import Admission, Ask


class Router(Protocol):
    """Decides; holds the fleet's state."""

    async def admit(self, ask: Ask) -> Admission: ...

    async def cancel(self, ticket: str) -> None:
        """Forget a ticket that was answered with :class:`Waiting`."""
        ...

    async def sync(self, report: Report) -> Orders:
        """Which leases this gateway uses and gives up; the answer may take half a second to come."""
        ...

    async def view(self) -> FleetView: ...

    async def rotation(self, history: int = HISTORY) -> RotationView:
        """What holds memory, who waits, and the last ``history`` decisions."""
        ...

    async def command(self, action: str, model: str = "", **arguments: Any) -> dict[str, Any]:
        """Act for an operator; the answer is JSON values.

        * ``load``, ``unload``, ``pin`` (``pinned``: bool) a model: ``{model, state, reason}`` as it is right after.
        * ``plan`` a model without acting: the fields of ``Plan.to_json`` (``verdict`` is resident, loading, fits,
          evicts, waits, never_fits or refused) and ``bytes``, what it needs part by part.
        * ``set_rotation`` (``add``, ``remove``: lists of names): which models may be used at all; ``{removed}``.
        * ``emergency_cleanup``: every idle unpinned model leaves now; ``{evicting}``.

        Raises:
            ModelNotFound, ModelAmbiguous: as ever.
            InvalidInput: no such action, or it contradicts a pin.
        """
        ...


class Backend(Protocol):
    """Makes one model answer."""

    def stream(self, entry: Entry, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]: ...

    async def embed(self, entry: Entry, request: EmbeddingRequest, epoch: int) -> Embeddings: ...
