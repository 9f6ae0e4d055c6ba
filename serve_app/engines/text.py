"""From token ids to text that can be sent: whole characters only, and never a part of a stop string.

Nothing here knows a tokenizer: the two functions that decode are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve_app.domain.generation import Delta

Decode = Callable[[Sequence[int]], str]
"""All ids so far to their text; an incomplete character at the end shows as U+FFFD."""
Step = Callable[[int], str | None]
"""The next id to the text that it completes; None while a character is incomplete."""

INCOMPLETE = "\ufffd"


def window_step(decode: Decode, before: Sequence[int] = ()) -> Step:
    """A :data:`Step` for any decoder: decodes a short window twice and takes the difference.

    A window is needed, because the text of a token may depend on the one before it (a leading space, for instance).

    Args:
        before: ids whose text is already out.
    """
    ids = list(before)
    start, done = 0, len(ids)  # ids[start:done] is the context whose text is already out

    def step(token: int) -> str | None:
        nonlocal start, done
        ids.append(token)
        before, now = decode(ids[start:done]), decode(ids[start:])
        if len(now) <= len(before) or now.endswith(INCOMPLETE):
            return None
        start, done = done, len(ids)
        return now[len(before) :]

    return step


def guarded_step(step: Step, decode: Decode) -> Step:
    """``step`` as long as it works, then :func:`window_step`.

    ``DecodeStream`` fails on bytes that are no UTF-8 where the tokenizer falls back to bytes (Llama 2): its decoder
    then takes back text that is already out. A model may well make such bytes, and its reply must not end with that.
    """
    given: list[int] = []
    pending: list[int] = []
    current = step

    def guarded(token: int) -> str | None:
        nonlocal current
        pending.append(token)
        try:
            text = current(token)
        except Exception:  # the tokenizers library raises nothing narrower
            current = window_step(decode, given)
            text = "".join(current(held) or "" for held in pending)
        if text:
            given.extend(pending)
            pending.clear()
        return text

    return guarded


class Detokenizer:
    """Ids in, text out; the text of all calls together is ``decode`` of all ids.

    Args:
        step: incremental decoder, for instance ``tokenizers.decoders.DecodeStream``, which is exact but never gives an
            incomplete tail away.
        decode: the whole of it, for the tail.
    """

    def __init__(self, step: Step, decode: Decode) -> None:
        self._step = step
        self._decode = decode
        self._ids: list[int] = []
        self._done = 0  # ids whose text is out

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._step(token) or ""
        if text:
            self._done = len(self._ids)
        return text

    def flush(self) -> str:
        """What ``push`` held back because a character was incomplete."""
        if self._done == len(self._ids):
            return ""
        known, self._done = self._done, len(self._ids)
        return self._decode(self._ids)[len(self._decode(self._ids[:known])) :]


class StopFilter:
    """Finds the first of several stop strings in text that comes in pieces of any size.

    The match that ends first counts, of two that end together the longer one; so the pieces never matter.
    One Knuth-Morris-Pratt automaton for each string: a character costs a few comparisons.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._failures = [_failure(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self.matched: str | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to find."""
        return not self._stops

    @property
    def held(self) -> int:
        """How many of the last characters could be the beginning of a stop string."""
        return max(self._states, default=0)

    def push(self, text: str) -> int | None:
        """Read on. Returns the position in ``text`` after which a stop string is complete, or None."""
        if not self._stops:
            return None
        for position, character in enumerate(text, start=1):
            if self._advance(character):
                return position
        return None

    def _advance(self, character: str) -> bool:
        for index, stop in enumerate(self._stops):
            state, failure = self._states[index], self._failures[index]
            while state and stop[state] != character:
                state = failure[state]
            state += stop[state] == character
            self._states[index] = state
            if state == len(stop):  # longest first: shorter ones that end here too are not looked at
                self.matched = stop
                return True
        return False


def _failure(pattern: str) -> list[int]:
    """For each length of a matched beginning, the length of the next shorter one that still matches."""
    table = [0] * (len(pattern) + 1)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = table[length]
        length += pattern[position] == pattern[length]
        table[position + 1] = length
    return table


@dataclass(frozen=True, slots=True)
class _Piece:
    ids: tuple[int, ...]
    text: str


class TextStream:
    """The deltas of one reply.

    The texts of all deltas so far are exactly the text of their ids so far: a token is given away when all of its text
    is, together with the ids before it that made no text of their own (a part of a character, a special token).

    Args:
        after: what the reply began with elsewhere: a stop string may begin there.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), after: str = "") -> None:
        self._detokenizer = detokenizer
        self._filter = StopFilter(stops)
        self._filter.push(after[-max(map(len, stops)) + 1 :] if stops and max(map(len, stops)) > 1 else "")
        self._textless: tuple[int, ...] = ()
        self._held: list[_Piece] = []

    @property
    def matched(self) -> str | None:
        """The stop string that was found; nothing must be pushed after it."""
        return self._filter.matched

    def push(self, token: int) -> Delta | None:
        """The next token; returns what can be given away now."""
        text = self._detokenizer.push(token)
        ids = (*self._textless, token) if self._textless else (token,)
        if not text:
            self._textless = ids
            return None
        self._textless = ()
        if self._filter.idle:  # nothing is ever held back
            return Delta(text, ids)
        return self._take(_Piece(ids, text))

    def replay(self, tokens: Sequence[int]) -> list[str]:
        """Tokens that were given away elsewhere, before any other is pushed; their texts, none of it held back."""
        given: list[str] = []
        for token in tokens:
            if self.matched is None:
                given.append(self._detokenizer.push(token))
                self._filter.push(given[-1])
        return given

    def finish(self) -> Delta | None:
        """What is left when no token follows."""
        rest = self._detokenizer.flush() if self.matched is None else ""
        delta = self._take(_Piece(self._textless, rest)) if rest else None
        pieces = [_Piece(delta.token_ids, delta.text)] if delta else []
        return _join([*pieces, *self._give(0)])

    def _take(self, piece: _Piece) -> Delta | None:
        end = self._filter.push(piece.text)
        self._held.append(piece)
        if end is None:
            return _join(self._give(self._filter.held))
        surplus = len(piece.text) - end
        return self._cut(surplus + len(self.matched or ""))

    def _give(self, held: int) -> list[_Piece]:
        """Take the pieces off that lie wholly before the last ``held`` characters."""
        given: list[_Piece] = []
        room = sum(len(piece.text) for piece in self._held) - held
        while self._held and len(self._held[0].text) <= room:
            piece = self._held.pop(0)
            room -= len(piece.text)
            given.append(piece)
        return given

    def _cut(self, length: int) -> Delta | None:
        """Give everything but the last ``length`` characters, and forget those."""
        given = self._give(length)
        rest = "".join(piece.text for piece in self._held)
        if len(rest) > length:
            given.append(_Piece(self._held[0].ids, rest[: len(rest) - length]))
        self._held.clear()
        return _join(given)


def _join(pieces: Sequence[_Piece]) -> Delta | None:
    if not pieces:
        return None
    return Delta("".join(piece.text for piece in pieces), tuple(token for piece in pieces for token in piece.ids))
