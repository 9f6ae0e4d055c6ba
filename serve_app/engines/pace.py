"""How much of the newcomers' prompts travels in a pass beside a step of the running streams. No tensors here."""

from __future__ import annotations

BLOCK = 16
"""Lengths are multiples of this: shapes repeat."""
MIN_CHUNK, MAX_CHUNK = 16, 512
MAX_CHUNK_GPU = 4096
"""A GPU is not busy with less."""
BURST = 4096
BURST_S = 0.5
"""While nobody runs, a pass may read this many tokens if it is known to take no longer than so many seconds: of a burst
all begin together then, and its last prompts need not be read in small pieces beside the steps of the first ones."""
TELLING = 256
"""Tokens of a pass that says how long such a pass takes: with fewer, it is what every pass costs that counts."""
SHARE = 0.6
"""Of a step's time that reading may add to it, on average: single passes vary."""
KEPT = 0.8
"""Of what earlier passes told, after one more."""


class Pace:
    """How many tokens of prompts may travel in one pass, so that running streams wait little longer than for a step.

    When newcomers outnumber the running streams, more of them wait than would be kept waiting: they get more, by the
    square of the ratio. A pass takes as long as a step, and something for each token of prompts; on a GPU that is next
    to nothing. Times are smoothed over a few passes.

    Args:
        most: tokens of prompts in one pass.
        burst: the same while nobody runs and a pass takes no longer than :data:`BURST_S`, if that is more.

    ``least``: tokens of prompts in a pass that is given any, for where fewer take as long.
    """

    def __init__(self, most: int = MAX_CHUNK, burst: int = 0) -> None:
        self._most = most
        self._burst = max(most, burst)
        self.least = MIN_CHUNK
        self._step_s: float | None = None
        self._more_s = self._tokens = 0.0
        self._alone_s = self._alone_tokens = 0.0

    def passed(self, steps: int, tokens: int, seconds: float) -> None:
        """A pass with a step of so many streams, and so many tokens of prompts, took so long."""
        if not steps and tokens >= TELLING:
            self._alone_s = KEPT * self._alone_s + seconds
            self._alone_tokens = KEPT * self._alone_tokens + tokens
        if tokens:
            # Sums, so that the noise of a pass with few tokens does not count as much as a pass with many.
            self._more_s = KEPT * self._more_s + seconds - (self._step_s or 0.0)
            self._tokens = KEPT * self._tokens + tokens
        else:
            self._step_s = seconds if self._step_s is None else KEPT * self._step_s + (1 - KEPT) * seconds

    def allowance(self, running: int, reading: int) -> int:
        """Tokens, a multiple of :data:`BLOCK`."""
        if not running:
            within = BURST_S * self._alone_tokens / self._alone_s if self._alone_s else 0
            return min(self._burst, max(self._most, int(within) // BLOCK * BLOCK))
        if self._step_s is None or self._more_s <= 0:
            return self._most
        tokens = SHARE * self._step_s * self._tokens / self._more_s * max(1.0, reading / running) ** 2
        return min(self._most, max(self.least, int(min(tokens, self._most)) // BLOCK * BLOCK))
