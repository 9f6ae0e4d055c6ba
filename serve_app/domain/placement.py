"""What a model needs and what a node has: CPUs, GPUs and bytes of memory, as Ray schedules by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

EPSILON = 1e-6
"""CPUs and GPUs are fractions; sums of them are compared with this tolerance."""


@dataclass(frozen=True, slots=True)
class Resources:
    """An amount of each resource; ``memory`` in bytes, ``math.inf`` where nothing limits it."""

    cpu: float = 0.0
    gpu: float = 0.0
    memory: float = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpu + other.cpu, self.gpu + other.gpu, self.memory + other.memory)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpu - other.cpu, self.gpu - other.gpu, self.memory - other.memory)

    def __repr__(self) -> str:
        parts = [f"{self.cpu:g} CPU"] if self.cpu else []
        parts += [f"{self.gpu:g} GPU"] if self.gpu else []
        parts += [readable(self.memory)] if self.memory or not parts else []
        return " + ".join(parts)

    def covers(self, demand: Resources) -> bool:
        """Whether ``demand`` fits into this amount."""
        return (
            self.cpu + EPSILON >= demand.cpu
            and self.gpu + EPSILON >= demand.gpu
            and (self.memory >= demand.memory or demand.memory <= 0)
        )

    def missing(self, demand: Resources) -> Resources:
        """How much more of each resource ``demand`` takes than there is."""
        short = Resources(demand.cpu - self.cpu, demand.gpu - self.gpu, demand.memory - self.memory)
        return Resources(
            short.cpu if short.cpu > EPSILON else 0.0,
            short.gpu if short.gpu > EPSILON else 0.0,
            max(0, short.memory) if demand.memory > 0 else 0,
        )

    def share_of(self, whole: Resources, short: Resources) -> float:
        """The largest fraction that this is of ``whole``, among the resources that are ``short``.

        The dominant share of A. Ghodsi et al., "Dominant Resource Fairness" (NSDI 2011), taken over what is scarce.
        """
        shares = [
            part / total
            for part, total, need in (
                (self.cpu, whole.cpu, short.cpu),
                (self.gpu, whole.gpu, short.gpu),
                (self.memory, whole.memory, short.memory),
            )
            if need > 0 and total > 0
        ]
        return max(shares, default=0.0)

    def to_json(self) -> dict[str, float | None]:
        """JSON knows no infinity: None where nothing limits an amount."""
        memory = limited(self.memory)
        return {
            "cpu": limited(self.cpu),
            "gpu": limited(self.gpu),
            "memoryBytes": None if memory is None else int(memory),
        }


def limited(amount: float) -> float | None:
    """An amount as JSON can say it: None where nothing limits it."""
    return amount if math.isfinite(amount) else None


NOTHING = Resources()


@dataclass(frozen=True, slots=True)
class Node:
    """A place where models land. ``pool`` is the provider instance whose models it takes.

    A machine of the Ray cluster is a node of the local pool; an Ollama server is the only node of a pool of its own,
    with its ``budget_bytes`` as memory.
    """

    name: str
    capacity: Resources
    pool: str


def readable(size: float) -> str:
    """Bytes in words: ``1.5 GiB``."""
    if math.isinf(size):
        return "unlimited"
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
