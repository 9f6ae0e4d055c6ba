"""What the client of one reply was told, who made which part of it, and how another attempt goes on with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve_app.domain.catalog import Entry
from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import InvalidInput, RotundaError
from serve_app.domain.events import Switched
from serve_app.domain.generation import Accepted, Delta, Finish, GenerationRequest, Item, Usage
from serve_app.domain.routing import Candidate, Route
from serve_app.domain.seam import Seam


@dataclass
class Part:
    """What one attempt added to a reply: where from. ``length`` in code points, ``tokens`` as they were counted."""

    model: str
    provider: str
    attempt: int
    length: int = 0
    tokens: int = 0


class Transcript:
    """The account of one reply. One writer: the gateway.

    Each attempt begins with :meth:`attempt`, which says what to ask the model for, and its items go through
    :meth:`heard`, which says what of them the client is to be told: what follows upon what it was told before.

    Args:
        request: as it came. When it continues a reply already, that is what the client knows.
    """

    def __init__(self, request: GenerationRequest) -> None:
        begun = request.continuation
        self._request = request
        self._texts = [begun.text] if begun else []
        self._length = len(begun.text) if begun else 0
        self._ids = list(begun.token_ids) if begun else []
        self._revision = begun.revision if begun else None
        self._earlier = begun.earlier if begun else 0
        self._spent = begun.spent if begun else 0
        self._reasoned = self._called = False
        self._prompt_tokens: int | None = None
        self._seam: Seam | None = None
        self._before = 0
        """Tokens that were spent before the present attempt."""
        self.parts: list[Part] = []

    def __repr__(self) -> str:
        return f"Transcript({self._length} characters, {self._spent} tokens, {len(self.parts)} attempts)"

    @property
    def begun(self) -> bool:
        """Whether the client was told something that cannot be taken back."""
        return bool(self._spent or self._length or self._reasoned or self._called)

    @property
    def obstacle(self) -> str | None:
        """Why nobody may go on with what was begun; None when somebody may."""
        if self._called:
            return "a tool call had begun"
        if self._request.tools.forced or self._request.options.response_format is not None:
            return "the reply must have a form"
        if self._by_text or (self._ids and self._revision):
            return None
        return "the model cannot read what it said"

    @property
    def _by_text(self) -> bool:
        """Whether a model may go on that reads the text alone: reasoning without an answer would come twice, and
        log-probabilities of two models do not belong into one list."""
        return self._length > 0 and self._request.options.logprobs is None

    def attempt(self, entry: Entry) -> GenerationRequest:
        """Begin an attempt with a model."""
        self.parts.append(Part(entry.full_name, entry.provider, len(self.parts) + 1))
        self._seam, self._before = None, self._spent
        return replace(self._request, model=entry.id, continuation=self._continuation())

    def _continuation(self) -> Continuation | None:
        if not self.begun:
            return None
        text, ids = "".join(self._texts), tuple(self._ids)
        self._texts = [text]
        return Continuation(text, ids, self._revision, self._earlier, self._spent, not self._by_text)

    def heard(self, item: Item) -> Sequence[Item]:
        """What of an attempt's next item the client is to be told.

        Raises:
            ProviderError: the model began the reply anew, and otherwise.
        """
        match item:
            case Accepted():
                return self._accepted(item)
            case Delta():
                return self._told(self._seam.feed(item) if self._seam else item)
            case Finish():
                return (*self._told(self._seam.finish() if self._seam else None), self._total(item))

    def _accepted(self, accepted: Accepted) -> Sequence[Item]:
        """Told of every attempt, for its revision; the prompt of the reply is the first one's."""
        if not self.begun:
            self._ids, self._revision, self._earlier = [], accepted.revision, 0
            self._prompt_tokens = accepted.prompt_tokens
            return (accepted,)
        if not (self._ids and accepted.revision and accepted.revision == self._revision):
            self._seam = Seam("".join(self._texts))
            self._ids, self._revision, self._earlier = [], accepted.revision, self._length
        self._prompt_tokens = self._prompt_tokens or accepted.prompt_tokens
        return (replace(accepted, prompt_tokens=self._prompt_tokens),)

    def _told(self, delta: Delta | None) -> Sequence[Item]:
        if delta is None:
            return ()
        part = self.parts[-1]
        self._spent += delta.tokens
        part.tokens += delta.tokens
        self._ids += delta.token_ids
        if delta.text:
            self._texts.append(delta.text)
            self._length += len(delta.text)
            part.length += len(delta.text)
        self._reasoned = self._reasoned or bool(delta.reasoning)
        self._called = self._called or bool(delta.tool_calls)
        return (delta,)

    def _total(self, finish: Finish) -> Finish:
        """The end with the usage of the whole reply: every token counts once."""
        if not self._before:
            return finish
        usage, again = finish.usage, self._seam.dropped if self._seam else 0
        part = self.parts[-1]
        part.tokens = max(0, usage.completion_tokens - again) if usage.completion_tokens else part.tokens
        self._spent = self._before + part.tokens
        # A server that told the length of its prompt only now counted the text so far with it.
        prompt = self._prompt_tokens or max(0, usage.prompt_tokens - self._before)
        return replace(finish, usage=Usage(prompt, self._spent, min(usage.cached_tokens, prompt)))


def worse(failure: RotundaError | None, error: RotundaError) -> RotundaError:
    """What the client is told of two failures: not that a fallback could not have done it either."""
    return failure if failure is not None and isinstance(error, InvalidInput) else error


def final(failure: RotundaError, transcript: Transcript) -> bool:
    """Whether nobody else need be asked: the request is wrong, its time is up, or the reply cannot be gone on with."""
    if isinstance(failure, InvalidInput) or failure.details.get("phase") == "total":
        return True
    return transcript.begun and transcript.obstacle is not None


def detour(route: Route, first: Candidate) -> Switched | None:
    """What the client is told when another model than the one it asked for is tried first."""
    if first is not route.first:
        return Switched(route.first.name, first.name, f"{route.first.name} failed several times in a row")
    return Switched(route.passed_over[0][0], first.name, route.passed_over[0][1]) if route.passed_over else None
