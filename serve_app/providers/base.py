"""The seam between an upstream replica and a remote model server.

A provider is made by :func:`serve_app.providers.registry.create`, lives in one asyncio event loop and holds no state
that another replica would need.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from serve_app.domain.catalog import ModelInfo
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.generation import GenerationRequest, Item


class Provider(Protocol):
    """A remote model server. Every method raises :class:`serve_app.domain.errors.RotundaError` only.

    ``ProviderUnavailable`` and ``DeadlineExceeded``: it cannot be reached, or is silent. ``ProviderError``: it answers
    with a failure of its own, breaks off, or does not speak its protocol. ``ModelNotFound``: it has no such model.
    """

    async def list_models(self) -> tuple[ModelInfo, ...]:
        """Every model that it offers, as far as it describes them."""
        ...

    async def describe(self, model: str) -> ModelInfo:
        """One model: what it can do, and its context length in tokens where the server says."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        """Yield one ``Accepted``, any number of ``Delta`` and one ``Finish``.

        ``Accepted`` means that the server has begun to answer. Its ``prompt_tokens`` are 0, as are those of a
        ``Usage`` whose server does not count: a real prompt has at least one token. Closing the iterator (or
        cancelling its consumer) closes the connection, by which the server knows that nobody reads any more.
        """
        ...

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """One vector for each text."""
        ...

    async def health(self) -> None:
        """Return when the server answers."""
        ...

    async def residency(self) -> Mapping[str, int] | None:
        """Bytes of each model that holds memory there right now; None for a server that does not say."""
        ...

    async def load(self, model: str) -> None:
        """Return once the model is in the server's memory. ``CapabilityMissing`` where the server decides alone."""
        ...

    async def unload(self, model: str) -> None:
        """Take the model out of the server's memory. ``CapabilityMissing`` where the server decides alone."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...
