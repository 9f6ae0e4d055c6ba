"""Models and providers by name: what exists, what it can do, and which one a name means."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from serve_app.domain.errors import InvalidConfig, ModelAmbiguous, ModelNotFound

LOCAL_PROVIDER = "huggingface"


class Task(StrEnum):
    """Hugging Face pipeline names of what a model is for."""

    TEXT_GENERATION = "text-generation"
    TEXT2TEXT_GENERATION = "text2text-generation"
    IMAGE_TEXT_TO_TEXT = "image-text-to-text"
    FEATURE_EXTRACTION = "feature-extraction"


class Capability(StrEnum):
    CHAT = "chat"
    COMPLETION = "completion"
    VISION = "vision"
    EMBEDDINGS = "embeddings"
    CHAT_TEMPLATE = "chat-template"
    TOOLS = "tools"


class ModelState(StrEnum):
    """Where a model is in its life; see ARCHITECTURE, Rotation."""

    COLD = "cold"
    QUEUED = "queued"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    RETIRING = "retiring"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"


RESIDENT = frozenset({ModelState.READY, ModelState.BUSY})


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model's files say, without loading it.

    ``size_bytes`` are the weights on disk, ``parameters`` their number, ``dtype`` the one that most of them have,
    ``context_length`` in tokens. ``revision`` changes whenever a file does. ``problem`` says in plain words why the
    model cannot be used (``problem_code`` is the error code it will be refused with); None for a usable model.
    """

    id: str
    path: str
    task: Task | None = None
    architecture: str | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    dtype: str | None = None
    context_length: int | None = None
    quantization: str | None = None
    capabilities: frozenset[Capability] = frozenset()
    revision: str = ""
    problem: str | None = None
    problem_code: str | None = None

    @property
    def usable(self) -> bool:
        return self.problem is None


@dataclass(frozen=True, slots=True)
class Entry:
    """One model that can be asked for.

    ``application`` and ``deployment`` are the Ray Serve names behind it. ``declared`` models stand in
    serve_config.yaml; the others were discovered and are deployed on first use. ``spec`` is the application's
    arguments as JSON values.
    """

    id: str
    provider: str
    application: str
    deployment: str
    info: ModelInfo | None = None
    declared: bool = False
    spec: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    """Why the model cannot be used right now, when it cannot."""
    shared: bool = False
    """Whether other models answer through the same application: those of a remote provider do."""

    @property
    def full_name(self) -> str:
        return f"{self.provider}/{self.id}"

    @property
    def unit(self) -> str:
        """What reports of the model are filed under: its application, or its full name when that is shared."""
        return self.full_name if self.shared else self.application

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self.info.capabilities if self.info else frozenset()


def application_name(model_id: str, provider: str = LOCAL_PROVIDER) -> str:
    """The Serve application of a model: ``model-`` + slug + 6 hex digits, unique and stable for the id.

    >>> application_name("rotunda/tiny-chat")
    'model-rotunda-tiny-chat-6e69be'
    """
    key = model_id if provider == LOCAL_PROVIDER else f"{provider}/{model_id}"
    slug = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")[:48]
    return f"model-{slug}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"


class Catalogue:
    """An immutable table of the entries and aliases; resolves names.

    Args:
        entries: the models of every provider.
        aliases: other names, each for an id or a ``provider/id``, or for several of which any may answer.
    """

    def __init__(self, entries: Iterable[Entry] = (), aliases: Mapping[str, str | Sequence[str]] | None = None) -> None:
        self.entries: tuple[Entry, ...] = tuple(sorted(entries, key=lambda entry: (entry.id, entry.provider)))
        self.aliases = {
            alias: (target,) if isinstance(target, str) else tuple(target) for alias, target in (aliases or {}).items()
        }
        self._by_id: dict[str, list[Entry]] = {}
        self._by_full_name = {entry.full_name: entry for entry in self.entries}
        for entry in self.entries:
            self._by_id.setdefault(entry.id, []).append(entry)
        for alias, targets in self.aliases.items():
            for target in targets:
                if target in self.aliases:
                    raise InvalidConfig(f"The alias {alias!r} points to another alias ({target!r}).")

    def __repr__(self) -> str:
        return f"Catalogue({', '.join(entry.full_name for entry in self.entries)})"

    def resolve(self, name: str) -> Entry:
        """The one entry that ``name`` means: an alias, ``provider/id``, or an id, in that order.

        Raises:
            ModelNotFound: nothing has the name; the message holds the nearest ones.
            ModelAmbiguous: several models have it; ``details["candidates"]`` lists the full names.
        """
        found = self.resolve_all(name)
        if len(found) > 1:
            raise self._ambiguous(name, found)
        return found[0]

    def resolve_all(self, name: str) -> tuple[Entry, ...]:
        """The entries of which any may answer to ``name``: one, or those of an alias for several that are there.

        Raises:
            ModelNotFound, ModelAmbiguous: as :meth:`resolve` does, for a name that is no alias for several.
        """
        targets = self.aliases.get(name, (name,))
        if len(targets) == 1:
            return (self._one(targets[0], name),)
        found: dict[str, Entry] = {}
        missing: ModelNotFound | None = None
        for target in targets:
            try:
                entry = self._one(target, target)
            except ModelNotFound as error:
                missing = missing or error
                continue
            found[entry.full_name] = entry
        if missing is not None and not found:
            raise missing
        return tuple(found.values())

    def _one(self, target: str, name: str) -> Entry:
        exact = self._by_full_name.get(target)
        if exact is not None:
            return exact
        matches = self._by_id.get(target, [])
        if len(matches) > 1:
            raise self._ambiguous(name, matches)
        if not matches:
            raise self._not_found(name)
        return matches[0]

    def name_of(self, entry: Entry) -> str:
        """The shortest name that means this entry and no other."""
        alone = len(self._by_id.get(entry.id, ())) == 1 and entry.id not in self._by_full_name
        return entry.id if alone and entry.id not in self.aliases else entry.full_name

    def names(self) -> list[str]:
        return [self.name_of(entry) for entry in self.entries]

    def _ambiguous(self, name: str, matches: Iterable[Entry]) -> ModelAmbiguous:
        names = sorted(entry.full_name for entry in matches)
        return ModelAmbiguous(
            f"Several models are called {name!r}: {', '.join(names)}. Ask for one by its full name.",
            details={"candidates": names},
        )

    def _not_found(self, name: str) -> ModelNotFound:
        known = [*self.names(), *self.aliases]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(near)}?" if near else " GET /api/models lists what there is."
        return ModelNotFound(f"There is no model called {name!r}.{hint}", details={"suggestions": near})
