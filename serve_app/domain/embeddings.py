"""Vectors of texts: what ``/v1/embeddings`` asks of a model and gets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, in their order, and the tokens that were read."""

    vectors: tuple[tuple[float, ...], ...] = field(repr=False)
    prompt_tokens: int
