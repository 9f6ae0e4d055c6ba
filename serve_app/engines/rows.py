"""Which request holds which row of the cache, and what finished requests leave there for others to reuse.

Pure bookkeeping: no tensors here. A row is *held* while a request owns it. Afterwards it is *kept*: its tokens stay,
and a request that begins with the same tokens takes the row over (the next turn of a conversation) or copies the
common part (a system prompt that many share). What all rows occupy together stays within the memory budget: the least
recently used kept rows are emptied first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIN_COPY = 16
"""Common tokens below which reading them anew is as cheap as copying them."""
CONTINUED = 0.9
"""A kept row of which this much begins a prompt is a conversation going on: its row is taken over."""


@dataclass(eq=False, slots=True)
class Row:
    """One row. ``ids``: the tokens whose keys and values it holds. ``occupied``: the tokens that it takes up or may
    come to take up in memory. ``index`` changes when rows change places."""

    index: int
    ids: list[int] = field(default_factory=list)
    held: bool = False
    occupied: int = 0
    used: int = 0

    def __repr__(self) -> str:
        return f"Row({self.index}, {len(self.ids)} tokens, {'held' if self.held else 'kept' if self.ids else 'empty'})"


@dataclass(frozen=True, slots=True)
class Taken:
    """A row for a new request: it shall begin with the first ``common`` tokens of ``source`` (maybe itself).
    ``emptied`` rows hold nothing any more; their memory is to be given back before anything is written."""

    row: Row
    source: Row | None
    common: int
    emptied: tuple[Row, ...]


class Rows:
    """All rows.

    Args:
        count: rows there are.
        budget: tokens that they may occupy together.
    """

    def __init__(self, count: int, budget: int) -> None:
        self.by_index = [Row(index) for index in range(count)]
        self._budget = budget
        self._clock = 0

    def __repr__(self) -> str:
        return f"Rows({self.by_index})"

    @property
    def held(self) -> list[Row]:
        return [row for row in self.by_index if row.held]

    def take(self, prompt: Sequence[int], room: int) -> Taken:
        """A row for a prompt whose request may come to hold ``room`` tokens. There must be one that nobody holds.

        At least the last token of the prompt is left to be read, since its logits are wanted.
        """
        source, common = self._best(prompt)
        row = self._pick(source, common)
        if row is not source and common < MIN_COPY:
            source, common = None, 0
        elif source is not None and not source.held and self._too_much(source.occupied + room):
            row = source  # no room for a copy beside it
        emptied = [row] if row is not source and row.occupied else []
        for old in emptied:
            self.empty(old)
        row.held, row.occupied = True, max(room, row.occupied)
        emptied += self._evict(spare=source)
        row.ids = list(prompt[:common])
        for touched in filter(None, (source, row)):
            self._clock += 1
            touched.used = self._clock
        return Taken(row, source, common, tuple(emptied))

    def release(self, row: Row) -> None:
        """Its request is over; what it read stays for others."""
        row.held = False
        row.occupied = len(row.ids)

    def empty(self, row: Row) -> None:
        row.ids, row.occupied, row.held = [], 0, False

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt some row holds."""
        return self._best(prompt)[1]

    def swaps(self, running: Iterable[Row]) -> list[tuple[Row, Row]]:
        """Pairs that must change places (and have, in this account) so that the running rows lie side by side.

        A pass runs over a whole range of rows, so that it can use the cache in place. A quarter of it may be others'.
        """
        rows = sorted(running, key=lambda row: row.index)
        wanted, pairs = set(rows), []
        while rows and rows[-1].index - rows[0].index + 1 - len(rows) > len(rows) // 4:
            last = rows.pop()
            gap = next(row for row in self.by_index[rows[0].index :] if row not in wanted)
            pairs.append((last, gap))
            self._swap(last, gap)
            rows = sorted([*rows, last], key=lambda row: row.index)
        return pairs

    def to_front(self, running: Iterable[Row], bound: int) -> list[tuple[Row, Row]]:
        """As :meth:`swaps`, so that the running rows, ``bound`` of them at most, are among the first ``bound``."""
        wanted = set(running)
        room = [row for row in self.by_index[:bound] if row not in wanted]
        room.sort(key=lambda row: len(row.ids), reverse=True)  # what is swapped is copied
        pairs = [(row, room.pop()) for row in sorted(wanted, key=lambda row: row.index) if row.index >= bound]
        for moved, other in pairs:
            self._swap(moved, other)
        return pairs

    def _swap(self, one: Row, other: Row) -> None:
        one.index, other.index = other.index, one.index
        self.by_index[one.index], self.by_index[other.index] = one, other

    def _best(self, prompt: Sequence[int]) -> tuple[Row | None, int]:
        best, length = None, 0
        for row in self.by_index:
            common = min(common_length(prompt, row.ids), len(prompt) - 1)
            if common > length or (common == length and best is not None and best.held and not row.held):
                best, length = row, common
        return (best, length) if length else (None, 0)

    def _pick(self, source: Row | None, common: int) -> Row:
        """The row to use: a kept one that the prompt continues, else an empty one, else the least recently used."""
        if source is not None and not source.held and common >= CONTINUED * len(source.ids):
            return source
        free = [row for row in self.by_index if not row.held]
        others = [row for row in free if row is not source] or free
        held = [row.index for row in self.by_index if row.held]
        near = held[0] if held else 0
        return min(others, key=lambda row: (row.used if row.ids else 0, abs(row.index - near)))

    def _too_much(self, more: int) -> bool:
        return sum(row.occupied for row in self.by_index if row.held) + more > self._budget

    def _evict(self, spare: Row | None) -> list[Row]:
        """Empty kept rows, the least recently used first, until the budget holds."""
        over = sum(row.occupied for row in self.by_index) - self._budget
        gone: list[Row] = []
        for row in sorted(self.by_index, key=lambda row: row.used):
            if over > 0 and row.occupied and not row.held and row is not spare:
                over -= row.occupied
                self.empty(row)
                gone.append(row)
        return gone


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike: bisection over slices, which compare at C speed."""
    low, high = 0, min(len(one), len(other))
    if not high or one[0] != other[0]:
        return 0
    one, other = list(one[:high]), list(other[:high])
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
