"""Where one model's text ends and another's goes on: nothing twice, nothing left out.

The second model was given the text so far (without its last blanks) as the beginning of its own answer. One that goes
on as it should gives the blanks again, maybe, and then what follows. Others repeat the last words, or begin the whole
answer anew; the repetition is found at the beginning of what they say, and dropped. Until it is clear which of them it
is, at most :data:`LOOK_BACK` characters are held back, and of a repetition all. Pure rules; nothing here knows a model.

What cannot be told apart: an honest text that goes on with the very words with which the answer began (or ended) looks
like a repetition. So only long ones count that do not repeat something in themselves, as verses and lists do. The
restart of an answer of less than :data:`SHORTEST` characters is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.domain.errors import ProviderError
from serve_app.domain.generation import Delta

RESTART = 24
"""Characters from the beginning of the answer that make a restart of it; all of a shorter answer."""
SHORTEST = 8
OVERLAP = 16
"""Characters from the end of the answer that make a repetition of them."""
LOOK_BACK = 256
"""Characters at the end of the answer in which a repetition may begin."""


class Seam:
    """The deltas of an attempt that goes on by text, as they follow upon ``before``, the answer so far.

    Ids stay with the delta in which they came, also when its text is dropped in whole or in part.
    """

    def __init__(self, before: str) -> None:
        self._before = before
        self._shown = before.rstrip()
        self._blanks = before[len(self._shown) :]
        self._held: list[Delta] = []
        self._open = True
        self.dropped = 0
        """Tokens that were made for nothing."""

    def __repr__(self) -> str:
        return f"Seam(open={self._open}, held={len(self._held)}, dropped={self.dropped})"

    def feed(self, delta: Delta) -> Delta | None:
        """What can be told now, or None.

        Raises:
            ProviderError: the answer was begun anew, and became another one.
        """
        if not self._open:
            return delta
        if not delta.text and not self._held:
            return delta
        self._held.append(delta)
        return self._decided(ended=False)

    def finish(self) -> Delta | None:
        """What is left when nothing follows; raises as :meth:`feed`."""
        return self._decided(ended=True) if self._held else None

    def _decided(self, ended: bool) -> Delta | None:
        text = "".join(delta.text for delta in self._held)
        known = self._known(text, ended)
        if known is None:
            return None
        held, self._held, self._open = self._held, [], False
        self.dropped = _tokens_within(held, known)
        joined = Delta.joined(held)
        return Delta(text[known:], joined.token_ids, joined.reasoning, joined.tool_calls, joined.logprobs)

    def _known(self, text: str, ended: bool) -> int | None:
        """How many characters of ``text`` were told already; None when that is not clear yet."""
        restarted = self._restarted(text, ended)
        if restarted != 0:
            return restarted
        blanks = common_prefix(self._blanks, text)
        if blanks == len(text) and not ended:
            return None
        overlap = self._overlap(text, ended)
        return overlap if overlap is None or overlap else blanks

    def _restarted(self, text: str, ended: bool) -> int | None:
        """How much ``text`` repeats of the answer's beginning; 0 when nothing, None when that is not clear yet."""
        whole = self._before if text[:1].isspace() else self._before.lstrip()
        length = len(whole.rstrip())
        if length < SHORTEST or _repeats_itself(whole[:RESTART].rstrip()):
            return 0
        same = common_prefix(whole, text)
        if same == len(text) < len(whole) and not ended:
            return None
        if same >= length:
            return same
        if same < RESTART:
            return 0
        raise ProviderError("The model began its answer anew instead of going on with it.", retryable=False)

    def _overlap(self, text: str, ended: bool) -> int | None:
        """How much ``text`` repeats of the answer's end; 0 when nothing, None when that is not clear yet."""
        tail = self._shown[-LOOK_BACK:]
        starts = range(len(tail) - max(OVERLAP, len(text) + 1) + 1)
        if not ended and any(tail.startswith(text, start) for start in starts):
            return None
        for length in range(min(len(text), len(tail)), OVERLAP - 1, -1):
            if tail.endswith(text[:length]) and not _repeats_itself(text[:length]):
                return length
        return 0


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    most = min(len(one), len(other))
    return next((place for place in range(most) if one[place] != other[place]), most)


def _repeats_itself(text: str) -> bool:
    """Whether the text is something shorter, twice or more: its period is at most half of its length."""
    return any(text[period:] == text[: len(text) - period] for period in range(1, len(text) // 2 + 1))


def _tokens_within(deltas: Sequence[Delta], characters: int) -> int:
    """How many tokens made the first ``characters``; a delta without ids counts as one."""
    tokens = 0
    for delta in deltas:
        characters -= len(delta.text)
        if characters < 0:
            break
        tokens += max(1, len(delta.token_ids)) if delta.text else 0
    return tokens
