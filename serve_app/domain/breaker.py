"""Circuit breakers as values: after several failures in a row a way is closed for a while, then tried once.

The pattern is M. Nygard's ("Release It!", 2007). Each change returns a new value and the clock is passed in. A model
has a breaker, and so has the application behind it: all models of a remote provider share one, so that a provider that
cannot be reached is not tried again once per model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from serve_app.domain.catalog import Entry
from serve_app.domain.errors import (
    DeadlineExceeded,
    GenerationFailed,
    ModelLoadFailed,
    ProviderError,
    ProviderUnavailable,
    RotundaError,
)
from serve_app.domain.routing import Candidate


class Circuit(StrEnum):
    """CLOSED lets everything pass, OPEN nothing, HALF_OPEN one try that decides."""

    CLOSED = "closed"
    HALF_OPEN = "half-open"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Rules:
    """``threshold`` failures in a row open a breaker; ``timeout_s`` seconds later one try may close it again."""

    threshold: int = 5
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """``failures`` in a row, and when the last one ``came``; when it ``opened``, and since when a try is under way.

    Times are clock seconds, or None.
    """

    failures: int = 0
    opened: float | None = None
    trying: float | None = None
    came: float | None = None

    def state(self, now: float, rules: Rules) -> Circuit:
        if self.opened is None:
            return Circuit.CLOSED
        return Circuit.OPEN if self.retry_in_s(now, rules) > 0 else Circuit.HALF_OPEN

    def retry_in_s(self, now: float, rules: Rules) -> float:
        """Seconds until something may pass; 0 when it may now. A try that never reports back counts as a failure."""
        if self.opened is None:
            return 0.0
        return max(0.0, max(self.opened, self.trying or self.opened) + rules.timeout_s - now)

    def tried(self, now: float) -> Breaker:
        """Something passes; through a half-open breaker nothing else does until it has reported back."""
        return self if self.opened is None else replace(self, trying=now)

    def failed(self, now: float, rules: Rules) -> Breaker:
        failures = self.failures + 1
        opens = self.opened is not None or failures >= rules.threshold
        return Breaker(failures, now if opens else None, came=now)

    def released(self) -> Breaker:
        """The try ended without saying anything about the health, for instance because its client left."""
        return replace(self, trying=None)


CLOSED = Breaker()


@dataclass
class Breakers:
    """The breakers of one gateway, by name of model and of application. One writer: that gateway.

    They are counted where the calls are made, so that no call is needed to know them.
    """

    rules: Rules = field(default_factory=Rules)
    _by_key: dict[str, Breaker] = field(default_factory=dict)

    def __repr__(self) -> str:
        opened = sorted(key for key, breaker in self._by_key.items() if breaker.opened is not None)
        return f"Breakers(opened={opened})"

    def state(self, entry: Entry, now: float) -> Circuit:
        """The worse of the model's and its application's."""
        found = {self._by_key.get(key, CLOSED).state(now, self.rules) for key in _keys(entry)}
        return next(state for state in (Circuit.OPEN, Circuit.HALF_OPEN, Circuit.CLOSED) if state in found)

    def broken(self, now: float) -> dict[str, Circuit]:
        """The state of every way, by name of model or application, that is open or only tried."""
        states = {key: breaker.state(now, self.rules) for key, breaker in self._by_key.items()}
        return {key: state for key, state in states.items() if state is not Circuit.CLOSED}

    def retry_in_s(self, entry: Entry, now: float) -> float:
        return max(self._by_key.get(key, CLOSED).retry_in_s(now, self.rules) for key in _keys(entry))

    def order(self, candidates: Sequence[Candidate], now: float) -> tuple[Candidate, ...]:
        """The candidates that may be called: healthy ones before those that are only tried, else in their order.

        Raises:
            ProviderUnavailable: every one of them failed lately; ``details["retryAfterS"]`` says when to come again.
        """
        states = [(self.state(candidate.entry, now), candidate) for candidate in candidates]
        healthy = [candidate for state, candidate in states if state is Circuit.CLOSED]
        tries = [candidate for state, candidate in states if state is Circuit.HALF_OPEN]
        if not healthy and not tries:
            raise self._refusal(candidates, now)
        return (*healthy, *tries)

    def tried(self, entry: Entry, now: float) -> None:
        """A call to the model begins."""
        for key in _keys(entry):
            if key in self._by_key:
                self._by_key[key] = self._by_key[key].tried(now)

    def succeeded(self, entry: Entry) -> None:
        """The model said something."""
        for key in _keys(entry):
            self._by_key.pop(key, None)

    def failed(self, entry: Entry, error: RotundaError, now: float, speaking_since: float | None = None) -> None:
        """A call ended with ``error``, which may say something about the health of the model, or of its provider.

        ``speaking_since``: when the call began, of one that broke off in the middle of its answer. Whatever breaks an
        answer breaks all that run beside it, which is one failure: those that began before the last one do not count.
        """
        self.released(entry)
        blamed = _blamed(entry, error)
        if blamed is None:
            return
        breaker = self._by_key.get(blamed, CLOSED)
        if speaking_since is None or breaker.came is None or speaking_since > breaker.came:
            self._by_key[blamed] = breaker.failed(now, self.rules)

    def released(self, entry: Entry) -> None:
        """A call ended without saying anything about the health."""
        for key in _keys(entry):
            if key in self._by_key:
                self._by_key[key] = self._by_key[key].released()

    def _refusal(self, candidates: Sequence[Candidate], now: float) -> ProviderUnavailable:
        waits = {candidate.name: self.retry_in_s(candidate.entry, now) for candidate in candidates}
        seconds = max(1, round(min(waits.values())))
        return ProviderUnavailable(
            f"{', '.join(waits)} failed several times in a row and will be tried again in {seconds} s.",
            candidates[0].entry.provider,
            details={"retryAfterS": seconds},
        )


def _keys(entry: Entry) -> tuple[str, str]:
    return entry.full_name, entry.application


def _blamed(entry: Entry, error: RotundaError) -> str | None:
    """Whose failure it is: the application's when it cannot be reached, the model's when it answers badly, or nobody's.

    A request that is wrong, a full queue and a client that set too short a limit say nothing about the health.
    """
    phase = error.details.get("phase")
    if isinstance(error, ProviderUnavailable) or (isinstance(error, DeadlineExceeded) and phase == "connect"):
        return entry.application
    if isinstance(error, DeadlineExceeded):
        return None if phase == "total" else entry.full_name
    if isinstance(error, ProviderError | ModelLoadFailed | GenerationFailed):
        return entry.full_name
    return None
