"""A model's tokens as what a client gets: answer, reasoning, tool calls, log-probabilities.

What stands for what is known from the chat template (:class:`Format`); a reply is read by one :class:`ReplyStream`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.domain.generation import Delta, FinishReason, GenerationRequest, TokenLogprob
from serve_app.engines.reasoning import Marks, Splitter, marks_of
from serve_app.engines.text import Detokenizer, TextStream
from serve_app.engines.tools import MARKS, Found, Reader, family_of, reader_for, takes_tools

HELD_TOKENS = 32
"""Tokens that may be held back in silence."""
NOTHING = Delta("")


@dataclass(frozen=True, slots=True)
class Picked:
    """A token's log-probability under the model itself, and the likeliest tokens there, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Form(Protocol):
    """What the reply must look like (:class:`serve_app.engines.structured.Grammar`)."""

    @property
    def complete(self) -> bool: ...


class MarkedDetokenizer(Detokenizer):
    """A detokenizer that gives the text of certain control tokens, which others leave out."""

    def __init__(self, inner: Detokenizer, marks: Mapping[int, str]) -> None:
        self._inner = inner
        self._marks = marks

    def push(self, token: int) -> str:
        text = self._inner.push(token)
        return self._inner.flush() + self._marks[token] if token in self._marks and not text else text

    def flush(self) -> str:
        return self._inner.flush()


@dataclass(frozen=True, slots=True)
class Format:
    """How a model writes what is no plain text.

    ``marks``: around its reasoning; None where the template knows none. ``family``: how it calls tools; None where the
    template does not take them. ``tokens``: control tokens that are marks, by id.
    """

    marks: Marks | None = None
    family: str | None = None
    tokens: Mapping[int, str] | None = None

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> Format:
        """By the chat template, which may be empty."""
        marks = marks_of(template)
        family = family_of(template) if takes_tools(template) else None
        texts = {*((marks.begin, marks.end) if marks else ()), *(MARKS[family] if family else ())}
        special = set(tokenizer.all_special_tokens) & texts if texts else set()
        return cls(marks, family, {tokenizer.convert_tokens_to_ids(text): text for text in special})

    def stream(
        self,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        thinking: bool = False,
        form: Form | None = None,
        spell: Callable[[int], bytes] | None = None,
    ) -> ReplyStream:
        """For the reply to ``request``.

        Args:
            stops: stop strings, those of the prompt's format included.
            thinking: whether the prompt leaves the model within its reasoning.
            form: what the reply must look like. Then it is all answer, or all calls.
            spell: a token's bytes, for log-probabilities.
        """
        marks = self.marks if form is None else None
        reads = request.tools.offered and self.family is not None and (form is None or request.tools.forced)
        names = [tool.name for tool in request.tools.tools]
        if self.tokens and (marks or reads):
            detokenizer = MarkedDetokenizer(detokenizer, self.tokens)
        after = request.continuation.beginning if request.continuation else ""
        return ReplyStream(
            TextStream(detokenizer, () if form is not None else stops, after),
            Splitter(marks, thinking) if marks else None,
            reader_for(self.family or "", names, request.tools.forced) if reads else None,
            request,
            form,
            spell,
        )


class ReplyStream:
    """The deltas of one reply.

    ``picked`` is filled by the sampler when log-probabilities are wanted: one entry for each token, before the token
    is pushed.
    """

    def __init__(
        self,
        text: TextStream,
        splitter: Splitter | None,
        reader: Reader | None,
        request: GenerationRequest,
        form: Form | None,
        spell: Callable[[int], bytes] | None,
    ) -> None:
        self.picked: list[Picked] = []
        self._text = text
        self._splitter = splitter
        self._reader = reader
        self._stop_tokens = frozenset(request.options.stop_token_ids)
        self._one_call = not request.tools.parallel
        self._form = form
        self._spell = spell or (lambda token: b"")
        self._held = NOTHING  # ids and log-probabilities of text that is held back
        self._calls = 0
        self._stopped = False

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._text.matched

    @property
    def complete(self) -> bool:
        """Whether the reply is whole: nothing must be pushed any more."""
        if self._stopped or self._text.matched is not None or (self._one_call and self._calls > 0):
            return True
        return self._form is not None and self._form.complete

    def reason(self, reason: FinishReason) -> FinishReason:
        """Why the reply ended, for the client: ``reason`` unless it called tools."""
        return FinishReason.TOOL_CALLS if self._calls and reason is FinishReason.STOP else reason

    def replay(self, tokens: Sequence[int]) -> None:
        """The tokens that an earlier attempt gave away: nothing of them is told again."""
        for text in self._text.replay(tokens):
            self._read(Delta(text))
        self._held = NOTHING

    def push(self, token: int) -> Delta | None:
        """The next token; returns what can be given away now."""
        if token in self._stop_tokens:
            self._stopped = True
            return None
        return self._read(self._text.push(token))

    def finish(self) -> Delta | None:
        """What is left when no token follows."""
        delta = self._read(self._text.finish()) or Delta("")
        reasoning, answer = self._splitter.finish() if self._splitter else ("", "")
        found = self._found(answer) if answer else Found()
        last = self._reader.finish() if self._reader else Found()
        found = Found(found.text + last.text, self._first_call(found.calls + last.calls))
        self._calls += len(found.calls)
        delta += Delta(found.text, reasoning=reasoning, tool_calls=tuple(found.calls))
        delta = self._held + delta if delta.text or delta.reasoning or delta.tool_calls else delta
        return delta if delta.text or delta.reasoning or delta.tool_calls else None

    def _read(self, delta: Delta | None) -> Delta | None:
        if delta is None:
            return None
        if self.picked:
            delta = Delta(delta.text, delta.token_ids, logprobs=self._logprobs(len(delta.token_ids)))
        if self._splitter is None and self._reader is None:
            return delta
        thinking = self._splitter is not None and self._splitter.reasoning
        reasoning, answer = self._splitter.feed(delta.text) if self._splitter else ("", delta.text)
        found = self._found(answer)
        self._calls += len(found.calls)
        own = () if thinking or (self._splitter and self._splitter.reasoning) else delta.logprobs
        more = Delta("", delta.token_ids, logprobs=own)
        self._held = self._held + more if self._held.token_ids or self._held.logprobs else more
        if not (found.text or reasoning or found.calls):
            return self._sign_of_life()
        held, self._held = self._held, NOTHING
        told = held.logprobs if found.text else ()
        return Delta(found.text, held.token_ids, reasoning, tuple(found.calls), told)

    def _sign_of_life(self) -> Delta | None:
        """Now and then the ids of what is held back: a long call must not look like a model that hangs."""
        if len(self._held.token_ids) < HELD_TOKENS:
            return None
        held, self._held = self._held, Delta("", logprobs=self._held.logprobs)
        return Delta("", held.token_ids)

    def _found(self, answer: str) -> Found:
        if self._reader is None:
            return Found(answer)
        found = self._reader.feed(answer)
        found.calls = self._first_call(found.calls)
        return found

    def _first_call(self, calls: list[Any]) -> list[Any]:
        return calls[: max(0, 1 - self._calls)] if self._one_call else calls

    def _logprobs(self, count: int) -> tuple[TokenLogprob, ...]:
        """Those of the next ``count`` tokens, which are told in the order in which they were picked."""
        given, self.picked[:count] = self.picked[:count], []
        return tuple(
            self._told(pick.token, pick.logprob, tuple(self._told(*pair) for pair in pick.top)) for pick in given
        )

    def _told(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        data = self._spell(token)
        return TokenLogprob(token, data.decode("utf-8", "replace"), logprob, data, top)
