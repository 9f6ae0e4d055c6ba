"""The seam between a model replica and what generates its tokens.

An engine is made by :func:`serve_app.engines.registry.create`, in a thread (loading may take minutes), and then lives
in one asyncio event loop. It owns whatever threads it computes in; ``generate`` never blocks the loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.domain.catalog import ModelInfo
from serve_app.domain.embeddings import Embeddings
from serve_app.domain.generation import GenerationRequest, Item, Marks

Progress = Callable[[str, float], None]
"""Told about a load: the phase ("import", "weights", "warmup") and how much of it is done (0 to 1). Must not raise."""


def no_progress(phase: str, fraction: float) -> None:
    """For loads that nobody watches."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a replica lets its engine use.

    ``threads``: compute threads. ``max_concurrency``: requests that generate at once. ``max_queue``: requests that wait
    beyond them. ``dtype``: "auto", "float32", "bfloat16" or "float16". ``context_length``: a lower limit than the
    model's own. ``extra``: options of one engine, by its own documentation.
    """

    threads: int = 1
    max_concurrency: int = 8
    max_queue: int = 256
    dtype: str = "auto"
    context_length: int | None = None
    max_tokens: int = 1024
    extra: tuple[tuple[str, str | int | float | bool | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine has done since it was made; ``tokens_after_cancel`` were computed for cancelled requests."""

    running: int = 0
    waiting: int = 0
    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_after_cancel: int = 0


class Engine(Protocol):
    """Generates. One method wide; the rest is life cycle and truth about itself."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def description(self) -> str:
        """Which engine with which settings, and why, in one line."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        """Yield one ``Accepted``, any number of ``Delta`` and one ``Finish``.

        Closing the iterator (or cancelling its consumer) stops the generation within one step. Failures raise
        :class:`serve_app.domain.errors.RotundaError` only; what can be refused is refused before ``Accepted``.
        """
        ...

    def counters(self) -> Counters: ...

    def check_health(self) -> None:
        """Raise :class:`RotundaError` when the engine can no longer serve."""
        ...

    async def close(self) -> None:
        """End running requests with an error and free what the engine holds."""
        ...


class Embedder(Engine, Protocol):
    """An engine whose model makes vectors."""

    async def embed(self, texts: Sequence[str], marks: Marks | None = None) -> Embeddings:
        """One vector for each text; ``marks`` are filled in. Raises :class:`RotundaError` only."""
        ...
