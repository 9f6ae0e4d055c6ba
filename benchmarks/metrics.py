"""What a run came to, in the names and JSON fields of vLLM's `bench serve`, so that its readers' tools read ours.

Beside them: ``slo_attainment`` counts good replies among all that were *sent*, ``tokens_per_chunk``, the client's own
lag, and which share of the replies had a token count from the server.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.stats import percentile, summary

PERCENTS = (50.0, 90.0, 95.0, 99.0)
SLO_NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: times in seconds on one clock. ``intended`` is when it was due, ``times`` when its text came."""

    model: str
    intended: float
    sent: float
    times: tuple[float, ...]
    ended: float
    status: int
    error: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    asked_tokens: int
    text: str = ""
    session: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and bool(self.times)

    @property
    def tokens(self) -> int:
        """The server's count; where it does not say, what was asked for."""
        return self.asked_tokens if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float:
        """From the intended arrival: a client or a server that is late does not hide it."""
        return self.times[0] - self.intended

    @property
    def e2el(self) -> float:
        return self.times[-1] - self.intended

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece of text and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    def keeps(self, slo: Mapping[str, float]) -> bool:
        """Whether it was answered, and within every bound (seconds)."""
        if not self.ok:
            return False
        found = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2el}
        return all(found[name] <= bound for name, bound in slo.items())


def concurrent_rate(samples: Sequence[Sample]) -> float | None:
    """Tokens per second while all streams run: from when the last one has begun until the first one ends. None when
    there is no such time."""
    begun, ended = max(sample.times[0] for sample in samples), min(sample.times[-1] for sample in samples)
    if ended <= begun:
        return None
    told = ((sum(begun < at <= ended for at in sample.times), sample) for sample in samples)
    return sum(pieces * sample.tokens / len(sample.times) for pieces, sample in told) / (ended - begun)


def metrics(samples: Sequence[Sample], duration: float, slo: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The figures of a run that took ``duration`` seconds; bounds of ``slo`` in seconds, by SLO_NAMES."""
    good = [sample for sample in samples if sample.ok]
    total_in = sum(sample.prompt_tokens or 0 for sample in good)
    total_out = sum(sample.tokens for sample in good)
    kept = sum(sample.keeps(slo) for sample in samples) if slo else None
    chunks = sum(len(sample.times) for sample in good)
    found: dict[str, Any] = {
        "duration": duration,
        "num_prompts": len(samples),
        "completed": len(good),
        "failed": len(samples) - len(good),
        "errors": dict(Counter(_reason(sample) for sample in samples if not sample.ok)),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(good) / duration,
        "output_throughput": total_out / duration,
        "total_token_throughput": (total_in + total_out) / duration,
        "request_goodput": None if kept is None else kept / duration,
        "slo_attainment": None if kept is None or not samples else kept / len(samples),
        "slo_ms": {name: bound * 1000 for name, bound in slo.items()} if slo else None,
        "tokens_per_chunk": total_out / chunks if chunks else None,
        "counted_by_server": sum(sample.completion_tokens is not None for sample in good) / len(good) if good else None,
    }
    found |= _latencies(good)
    lags = [sample.sent - sample.intended for sample in samples]
    found["client_lag_ms"] = {f"p{percent:g}": _ms(percentile(lags, percent)) for percent in (50.0, 99.0, 100.0)}
    return found


def _latencies(good: Sequence[Sample]) -> dict[str, Any]:
    values = {
        "ttft_ms": [sample.ttft * 1000 for sample in good],
        "tpot_ms": [tpot * 1000 for sample in good if (tpot := sample.tpot) is not None],
        "itl_ms": [gap * 1000 for sample in good for gap in sample.gaps],
        "e2el_ms": [sample.e2el * 1000 for sample in good],
    }
    return {key: value for name, rows in values.items() for key, value in summary(rows, name, PERCENTS).items()}


def _reason(sample: Sample) -> str:
    return sample.error or f"no text (HTTP {sample.status})"


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1000, 3)


def detail(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """vLLM's lists for each request, in seconds: what plots are drawn from."""
    good = [sample for sample in samples if sample.ok]
    return {
        "input_lens": [sample.prompt_tokens for sample in good],
        "output_lens": [sample.tokens for sample in good],
        "ttfts": [sample.ttft for sample in good],
        "itls": [sample.gaps for sample in good],
    }
