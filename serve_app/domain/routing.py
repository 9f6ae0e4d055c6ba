"""Which models may answer a request, in which order, and why. Pure: the catalogue and the fleet are passed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.domain.catalog import RESIDENT, Capability, Catalogue, Entry, ModelState
from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    InvalidInput,
    ModelError,
    ProviderUnavailable,
    RotundaError,
    error_from_dict,
)
from serve_app.domain.events import Loading, Queued
from serve_app.domain.generation import Priority


@dataclass(frozen=True, slots=True)
class Ask:
    """What the gateway wants to know: may this request run, and where?

    ``model`` None means the default. ``needs`` are capabilities that the request cannot do without, ``least_tokens``
    so many tokens its prompt has at least. ``holder`` is the gateway that asks, and will hold the lease; ``waited_s``
    is how long the request has waited already. ``alone``: no other model will do, not even one that is configured as a
    fallback.
    """

    ticket: str
    model: str | None
    needs: frozenset[Capability] = frozenset({Capability.CHAT})
    fallbacks: tuple[str, ...] = ()
    priority: Priority = Priority.HIGH
    caller: str = "anonymous"
    holder: str = ""
    waited_s: float = 0.0
    alone: bool = False
    least_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may answer; ``reason`` says why it stands where it stands."""

    entry: Entry
    name: str
    state: ModelState
    reason: str

    @property
    def resident(self) -> bool:
        return self.state in RESIDENT


@dataclass(frozen=True, slots=True)
class Route:
    """Candidates in the order in which they are tried; never empty.

    ``passed_over``: models that were asked for before the first candidate and cannot answer, each with the reason.
    ``momentary``: another request for the same, or the same one a moment later, may be routed in another way.
    """

    candidates: tuple[Candidate, ...]
    passed_over: tuple[tuple[str, str], ...] = ()
    momentary: bool = False

    @property
    def first(self) -> Candidate:
        return self.candidates[0]

    def takes(self, least_tokens: int) -> bool:
        """Whether a prompt of so many tokens may fit every candidate."""
        return all(fits(candidate.entry, least_tokens) for candidate in self.candidates)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to call a model until ``ttl_s`` seconds after it was given; a replica refuses an older ``epoch``."""

    model: str
    epoch: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Granted:
    route: Route
    lease: Lease


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not yet: ask again with the same ticket when there is news, and after ``retry_in_s`` seconds at the latest.

    ``loading`` names the model from the moment that room is being made for it, ``evicting`` those that leave.
    """

    ticket: str
    route: Route
    position: int
    reason: str
    eta_ms: int | None = None
    loading: str | None = None
    evicting: tuple[str, ...] = ()
    retry_in_s: float = 0.25

    @property
    def news(self) -> Queued | Loading:
        """What a client is told of its place."""
        if self.loading is not None:
            return Loading(self.loading, self.evicting)
        return Queued(self.position, self.reason, self.eta_ms)


Admission = Granted | Waiting


class FleetState(Protocol):
    """What routing must know of the fleet at one moment."""

    def state_of(self, entry: Entry) -> tuple[ModelState, str | None]: ...

    def failure_of(self, entry: Entry) -> Mapping[str, Any] | None: ...

    def expected_s(self, entry: Entry) -> float:
        """How long a reply may take there by what was measured: a mean reply for each request that a replica has, and
        for this one. 0 where nothing was measured yet, so that it is."""
        ...


def choose(ask: Ask, catalogue: Catalogue, fleet: FleetState, default_model: str | None = None) -> Route:
    """The route of ``ask``: its model, then its fallbacks, each checked before anything is called.

    What was asked for comes first. Where that is a name for several models, those in memory go before cold ones, then
    by how long a reply may take there (:meth:`FleetState.expected_s`). Fallbacks that are in memory go before cold
    ones, else in their order. Which are healthy, the gateway knows (:meth:`~serve_app.domain.breaker.Breakers.order`).

    Raises:
        ModelNotFound, ModelAmbiguous: the name means nothing, or too much.
        CapabilityMissing: the model cannot do what the request needs.
        ContextLengthExceeded: the prompt is surely too long for the model.
        ModelLoadFailed, ModelUnsafe, …: the model cannot be used, with its reason.
        InvalidInput: no model was named and there is no default.
    """
    names = [ask.model or default_chat_model(catalogue, default_model), *ask.fallbacks]
    readings = [_read(name, rank, ask, catalogue, fleet) for rank, name in enumerate(names)]
    if not readings[0].found and not isinstance(readings[0].refusal, ModelError | ProviderUnavailable):
        raise readings[0].refused[0][1]
    found = [one for reading in readings[1:] for one in reading.found]
    ordered = [*readings[0].found, *sorted(found, key=lambda candidate: not candidate.resident)]
    if not ordered:
        raise readings[0].refused[0][1]
    candidates = tuple({candidate.entry.full_name: candidate for candidate in ordered}.values())
    first = next(rank for rank, reading in enumerate(readings) if ordered[0] in reading.found)
    passed_over = [(name, error.message) for reading in readings[:first] for name, error in reading.refused]
    return Route(candidates, tuple(passed_over), any(reading.momentary for reading in readings))


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one name of a request means: who may answer to it, best first, and who cannot."""

    found: list[Candidate]
    refused: list[tuple[str, RotundaError]]
    momentary: bool = False

    @property
    def refusal(self) -> RotundaError | None:
        return self.refused[0][1] if self.refused else None


def _read(name: str, rank: int, ask: Ask, catalogue: Catalogue, fleet: FleetState) -> _Reading:
    try:
        entries = catalogue.resolve_all(name)
    except RotundaError as error:
        return _Reading([], [(name, error)])
    found, refused = [], []
    for entry in entries:
        label = name if len(entries) == 1 else catalogue.name_of(entry)
        try:
            found.append(_candidate(entry, rank, ask, catalogue, fleet))
        except RotundaError as error:
            refused.append((label, error))
    if len(entries) > 1:
        found.sort(key=lambda candidate: (not candidate.resident, fleet.expected_s(candidate.entry)))
    too_long = any(isinstance(error, ContextLengthExceeded) for _, error in refused)
    return _Reading(found, refused, len(entries) > 1 or too_long)


def _candidate(entry: Entry, rank: int, ask: Ask, catalogue: Catalogue, fleet: FleetState) -> Candidate:
    _check_usable(entry)
    _check_capabilities(entry, ask.needs, catalogue)
    if not fits(entry, ask.least_tokens):
        raise _too_long(entry, ask.least_tokens)
    failure = fleet.failure_of(entry)
    if failure is not None:
        raise error_from_dict({**failure, "provider": entry.provider})
    state, reason = fleet.state_of(entry)
    if state is ModelState.UNAVAILABLE:
        raise ProviderUnavailable(f"{entry.id} is unavailable: {reason}", entry.provider)
    why = "the model that was asked for" if rank == 0 else f"fallback {rank}"
    return Candidate(entry, catalogue.name_of(entry), state, f"{why}, {state.value}")


def fits(entry: Entry, least_tokens: int) -> bool:
    """Whether a prompt of so many tokens may leave room for one token of a reply, as far as one knows."""
    context = entry.info.context_length if entry.info else None
    return not context or least_tokens < context


def _too_long(entry: Entry, least_tokens: int) -> ContextLengthExceeded:
    context = entry.info.context_length if entry.info else None
    return ContextLengthExceeded(
        f"The prompt has at least {least_tokens} tokens; {entry.id} reads {context} with its reply. Shorten it, or ask "
        "a model with a longer context.",
        provider=entry.provider,
        details={"leastTokens": least_tokens, "contextLength": context},
    )


def _check_usable(entry: Entry) -> None:
    info = entry.info
    if info is not None and info.problem is not None:
        raise error_from_dict(
            {
                "code": info.problem_code or "MODEL_LOAD_FAILED",
                "message": f"{entry.id} cannot be used: {info.problem}",
                "provider": entry.provider,
                "retryable": False,
            }
        )


def _check_capabilities(entry: Entry, needs: frozenset[Capability], catalogue: Catalogue) -> None:
    missing = needs - entry.capabilities
    if not missing or entry.info is None:
        return
    able = [catalogue.name_of(other) for other in catalogue.entries if needs <= other.capabilities]
    hint = f" These can: {', '.join(able)}." if able else ""
    raise CapabilityMissing(
        f"{entry.id} cannot do what the request needs ({', '.join(sorted(missing))}).{hint}",
        provider=entry.provider,
        details={"missing": sorted(missing), "capable": able},
    )


def default_chat_model(catalogue: Catalogue, default_model: str | None) -> str:
    """The configured default, else the only chat model there is.

    Raises:
        InvalidInput: there are none or several; the message lists them.
    """
    if default_model:
        return default_model
    able = list(_names_with(catalogue, Capability.CHAT))
    if len(able) == 1:
        return able[0]
    listed = f"name one of: {', '.join(able)}" if able else "none is available"
    raise InvalidInput(f"No model was named and there is no default; {listed}.", details={"models": able})


def _names_with(catalogue: Catalogue, capability: Capability) -> Iterable[str]:
    for entry in catalogue.entries:
        if capability in entry.capabilities and entry.info is not None and entry.info.usable:
            yield catalogue.name_of(entry)
