"""How much `tiny-vision` is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of the language stage: steps, tokens per step, turns per conversation, and the share of drills."""

    steps: int
    tokens: int
    turns: tuple[int, int]
    drills: float


@dataclass(frozen=True)
class Recipe:
    """How much to train; the defaults are what the committed weights were trained with."""

    images: int = 60_000
    unnamed_images: int = 40_000
    repainted: float = 0.7
    shade_weight: float = 1.0
    outline_weight: float = 1.0
    vision_steps: int = 10_000
    vision_batch: int = 32
    vision_rate: float = 3e-3
    word_steps: int = 1_500
    word_rate: float = 1e-3
    word_repainted: float = 0.3
    language_rate: float = 3e-3
    probe_weight: float = 0.3
    # The rate falls along a cosine over all phases, so the long one must not come so late that nothing is left of it.
    phases: tuple[Phase, ...] = (
        Phase(steps=700, tokens=2_048, turns=(1, 2), drills=0.9),
        Phase(steps=900, tokens=2_048, turns=(1, 6), drills=0.5),
        Phase(steps=700, tokens=4_096, turns=(2, 44), drills=0.25),
    )
