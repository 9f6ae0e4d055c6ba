"""Which models may answer a request, in which order, and why. Pure: the catalogue and the fleet are passed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.domain.catalog import RESIDENT, Capability, Catalogue, Entry, ModelState
from serve_app.domain.errors import (
    CapabilityMissing,
    InvalidInput,
    ModelError,
    ProviderUnavailable,
    RotundaError,
    error_from_dict,
)
from serve_app.domain.generation import Priority


@dataclass(frozen=True, slots=True)
class Ask:
    """What the gateway wants to know: may this request run, and where?

    ``model`` None means the default. ``needs`` are capabilities that the request cannot do without. ``holder`` is the
    gateway that asks, and will hold the lease; ``waited_s`` is how long the request has waited already. ``alone``: no
    other model will do, not even one that is configured as a fallback.
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
    """

    candidates: tuple[Candidate, ...]
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def first(self) -> Candidate:
        return self.candidates[0]


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


Admission = Granted | Waiting


class FleetState(Protocol):
    """What routing must know of the fleet at one moment."""

    def state_of(self, entry: Entry) -> tuple[ModelState, str | None]: ...

    def failure_of(self, entry: Entry) -> Mapping[str, Any] | None: ...


def choose(ask: Ask, catalogue: Catalogue, fleet: FleetState, default_model: str | None = None) -> Route:
    """The route of ``ask``: its model, then its fallbacks, each checked before anything is called.

    Raises:
        ModelNotFound, ModelAmbiguous: the name means nothing, or too much.
        CapabilityMissing: the model cannot do what the request needs.
        ModelLoadFailed, ModelUnsafe, …: the model cannot be used, with its reason.
        InvalidInput: no model was named and there is no default.
    """
    names = [ask.model or default_chat_model(catalogue, default_model), *ask.fallbacks]
    candidates: list[Candidate] = []
    passed_over: list[tuple[str, str]] = []
    refusal: RotundaError | None = None
    for rank, name in enumerate(names):
        try:
            candidates.append(_candidate(name, rank, ask, catalogue, fleet))
        except RotundaError as error:
            refusal = refusal or error
            if rank == 0 and not isinstance(error, ModelError | ProviderUnavailable):
                raise
            if not candidates:
                passed_over.append((name, error.message))
    if not candidates:
        assert refusal is not None
        raise refusal
    return Route(tuple(candidates), tuple(passed_over))


def _candidate(name: str, rank: int, ask: Ask, catalogue: Catalogue, fleet: FleetState) -> Candidate:
    entry = catalogue.resolve(name)
    _check_usable(entry)
    _check_capabilities(entry, ask.needs, catalogue)
    failure = fleet.failure_of(entry)
    if failure is not None:
        raise error_from_dict({**failure, "provider": entry.provider})
    state, reason = fleet.state_of(entry)
    if state is ModelState.UNAVAILABLE:
        raise ProviderUnavailable(f"{entry.id} is unavailable: {reason}", entry.provider)
    why = "the model that was asked for" if rank == 0 else f"fallback {rank}"
    return Candidate(entry, catalogue.name_of(entry), state, f"{why}, {state.value}")


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
