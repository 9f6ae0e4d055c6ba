"""Vectors of texts: what ``/v1/embeddings`` asks of a model and gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.domain.generation import Marks


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts to embed. ``trace`` and ``marks`` are as those of a generation request."""

    request_id: str
    model: str
    texts: tuple[str, ...] = field(repr=False)
    encoding: str = "float"
    trace: Mapping[str, str] = field(default_factory=dict)
    marks: Marks = field(default_factory=Marks, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, in their order, and the tokens that were read."""

    vectors: tuple[tuple[float, ...], ...] = field(repr=False)
    prompt_tokens: int
