"""How much of the newcomers' prompts travels in a pass beside a step of the running streams. No tensors here."""

from __future__ import annotations

BLOCK = 16
"""Lengths are multiples of this: shapes repeat."""
MIN_CHUNK, MAX_CHUNK = 16, 512
MAX_CHUNK_GPU = 4096
"""A GPU is not busy with less."""
SHARE = 0.6
"""Of a step's time that reading may add to it, on average: single passes vary."""


class Pace:
    """How many tokens of prompts may travel in one pass, so that running streams wait little longer than for a step.

    When newcomers outnumber the running streams, more of them wait than would be kept waiting: they get more, by the
    square of the ratio. Times are smoothed over a few passes.

    Args:
        most: tokens of prompts in one pass.
    """

    def __init__(self, most: int = MAX_CHUNK) -> None:
        self._most = most
        self._step_s: float | None = None
        self._token_s: float | None = None

    def passed(self, steps: int, tokens: int, seconds: float) -> None:
        """A pass with a step of so many streams, and so many tokens of prompts, took so long."""
        if not tokens:
            self._step_s = _smooth(self._step_s, seconds)
        elif not steps:
            self._token_s = _smooth(self._token_s, seconds / tokens)
        elif self._step_s is not None:
            self._token_s = _smooth(self._token_s, max(0.0, seconds - self._step_s) / tokens)

    def allowance(self, running: int, reading: int) -> int:
        """Tokens, a multiple of :data:`BLOCK`."""
        if not running or self._step_s is None or not self._token_s:
            return self._most
        tokens = int(SHARE * self._step_s / self._token_s * max(1.0, reading / running) ** 2)
        return min(self._most, max(MIN_CHUNK, tokens // BLOCK * BLOCK))


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else 0.8 * old + 0.2 * new
