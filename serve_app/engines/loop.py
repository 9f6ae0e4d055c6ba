"""The arithmetic of continuous batching: passes over the rows of one cache, computed, or replayed from graphs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engines.cache import SlotCache
from serve_app.engines.gate import LayerKinds
from serve_app.engines.graphs import PIECES, Graphs, Record, Shape
from serve_app.engines.groups import Groups
from serve_app.engines.pace import BLOCK
from serve_app.engines.packed import Group, Padded, exchanged, together
from serve_app.engines.rows import Row, Rows
from serve_app.engines.sampling import Sampler

MOST_REPLAYS = 4
"""Of pieces of prompts; a pass with more of them takes no longer than their replays one after the other."""


@dataclass(eq=False, slots=True)
class Seat:
    """One request in the slots: what it still has to read is ``ids[len(row.ids):]``."""

    ids: list[int]
    room: int
    row: Row | None = None
    sampler: Sampler | None = None
    passed_over: int = 0
    cached: int = 0

    @property
    def left(self) -> int:
        return len(self.ids) - (len(self.row.ids) if self.row is not None else 0)


@dataclass(frozen=True, slots=True)
class Feed:
    """What one seat takes from a pass: its next ``tokens``. ``wanted``: whether the logits after them are."""

    seat: Seat
    tokens: Sequence[int]
    wanted: bool = True


class SlotLoop:
    """The arithmetic on seats; knows no jobs.

    Args:
        model: of transformers, in evaluation mode; passed the gate.
        kinds: its layers' kinds of attention.
        rows: of the cache.
        limit: tokens that one row may come to hold.
        budget: tokens that all rows may occupy together.
        record: makes replays of steps (:mod:`serve_app.engines.graphs`); None: they are computed anew.
    """

    def __init__(
        self,
        model: Any,
        kinds: LayerKinds,
        rows: int,
        limit: int,
        budget: int,
        record: Record | None = None,
    ) -> None:
        self._model = model
        self._kinds = kinds
        self._device = model.device
        self._config = model.config.get_text_config(decoder=True)
        capacity = -(-limit // BLOCK) * BLOCK
        self._groups = Groups(kinds, capacity, self._device, model.dtype)
        # What the model passes on as its mask only tells :mod:`packed` which kind is meant.
        self._masks = {kind: torch.zeros(1, 1, 1, 1, device=self._device) for kind in kinds.windows}
        self._indices = torch.arange(rows, device=self._device)
        scratch = 0 if record is None else BLOCK  # where rows write that have no step: nobody looks there
        self._cache = SlotCache(len(kinds.layers), rows, capacity + scratch, self._device)
        whole = Shape(rows, capacity)
        self.graphs = None if record is None else Graphs(self._compute, whole, self._device, record)
        self.replayed = False
        self.pads = not self.on_cpu
        self._unlike = itertools.count(-1, -1)
        self.rows = Rows(rows, budget)
        self.limit = limit
        self.windows = [window for window in kinds.windows.values() if window]

    @property
    def on_cpu(self) -> bool:
        return bool(self._device.type == "cpu")

    def tells(self, running: int) -> bool:
        """Whether the time of the latest pass, with so many steps, says what prompts add to a step. A replay's does
        where prompts are replayed too, and with a step, for whose token somebody has waited."""
        return not self.replayed or (running > 0 and self.graphs is not None and self.graphs.reads)

    def sit(self, seat: Seat) -> None:
        """Give it a row, with as much of its prompt as is already in the cache."""
        taken = self.rows.take(seat.ids, seat.room)
        for row in taken.emptied:
            self._cache.empty_row(row.index)
        if taken.source is not None and taken.source is not taken.row:
            self._cache.copy_row(taken.source.index, taken.row.index, taken.common)
        seat.row, seat.cached = taken.row, taken.common

    def adopt(self, seat: Seat, cache: Any) -> None:
        """Sit with a prompt that was read elsewhere; ``cache`` holds it, and nothing else."""
        prompt, seat.ids = seat.ids, [next(self._unlike)] * len(seat.ids)  # no other prompt begins like it
        self.sit(seat)
        row = _row(seat)
        self._cache.adopt_row(row.index, cache, len(prompt))
        row.ids = list(seat.ids)

    def run(self, feeds: Sequence[Feed], replay: bool = True) -> torch.Tensor:
        """One pass; the logits ``[feeds that want them, vocabulary]`` after their tokens, in the order of ``feeds``.

        Where there are CUDA graphs and ``replay`` allows it, steps are replayed, and then one piece of a prompt after
        the other if they are few; :attr:`replayed` tells.
        """
        steps = [feed for feed in feeds if len(feed.tokens) == 1]
        pieces = [feed for feed in feeds if len(feed.tokens) > 1]
        logits = self._replay(feeds, steps, pieces) if replay else None
        self.replayed = logits is not None
        if logits is None:
            logits = self._computed(feeds, steps, pieces)
        for feed in feeds:
            _row(feed.seat).ids += feed.tokens
        return logits

    def _computed(self, feeds: Sequence[Feed], steps: Sequence[Feed], pieces: Sequence[Feed]) -> torch.Tensor:
        batches = self._batches(pieces)
        line = [*steps, *(pieces[number] for batch in batches for number in batch)]
        at = {feed.seat: number for number, feed in enumerate(line)}
        wanted = [at[feed.seat] for feed in feeds if feed.wanted]
        self._exchange(self.rows.swaps([_row(feed.seat) for feed in steps]))
        return self._forward(line, len(steps), [len(batch) for batch in batches], wanted)

    def _batches(self, pieces: Sequence[Feed]) -> list[list[int]]:
        """Which pieces of prompts share a call of attention: their numbers, in the order of their rows."""
        if not self.pads or len(pieces) < 2:
            return [[number] for number in range(len(pieces))]
        sizes = [(len(feed.tokens), len(_row(feed.seat).ids) + len(feed.tokens)) for feed in pieces]
        return [sorted(batch, key=lambda number: _row(pieces[number].seat).index) for batch in together(sizes)]

    def _exchange(self, pairs: Sequence[tuple[Row, Row]]) -> None:
        for moved, other in pairs:
            self._cache.swap_rows(other.index, moved.index, (len(moved.ids), len(other.ids)))
            if not other.occupied:
                self._cache.empty_row(other.index)

    def _forward(self, line: Sequence[Feed], steps: int, batches: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
        """The logits after the ``wanted`` feeds of a pass over all tokens of the line, ``[wanted, vocabulary]``.

        The first feeds are ``steps``; the pieces of prompts after them are of ``batches`` of so many.
        """
        counts = [len(feed.tokens) for feed in line]
        starts = [len(_row(feed.seat).ids) for feed in line]
        rows = [_row(feed.seat).index for feed in line]
        groups = self._groups.of(rows, starts, counts, steps, batches)
        ends = [end - 1 for end in itertools.accumulate(counts)]
        ids, positions, of_rows, last = self._groups.sent(
            [token for feed in line for token in feed.tokens],
            [place for start, count in zip(starts, counts, strict=True) for place in range(start, start + count)],
            [row for row, count in zip(rows, counts, strict=True) for _ in range(count)],
            [ends[number] for number in wanted],
        )
        self._cache.place.set(of_rows, positions)
        keep = {"logits_to_keep": last} if self._kinds.keeps_logits else {}
        logits = self._logits(ids, positions, groups, **keep)
        return logits if keep else logits[last]

    def _logits(
        self, ids: torch.Tensor, positions: torch.Tensor, groups: Sequence[Group | Padded], **keep: torch.Tensor
    ) -> torch.Tensor:
        masks = self._masks if len(self._masks) > 1 else next(iter(self._masks.values()))
        kinds_by_mask = {mask.data_ptr(): kind for kind, mask in self._masks.items()}
        with exchanged(self._config, groups, kinds_by_mask):
            logits: torch.Tensor = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                attention_mask=masks,
                **keep,
            ).logits[0]
        return logits

    def _replay(self, feeds: Sequence[Feed], steps: Sequence[Feed], pieces: Sequence[Feed]) -> torch.Tensor | None:
        """What :meth:`_computed` gives; None where there is no graph, or would be more of them than a pass is worth."""
        if self.graphs is None or not self.graphs.active:
            return None
        if pieces and not (self.graphs.reads and sum(map(_replays, pieces)) <= MOST_REPLAYS):
            return None
        found: dict[Seat, torch.Tensor] = {}
        asked = [feed.seat for feed in steps if feed.wanted]
        if steps:
            logits = self._replay_steps(self.graphs, steps, [_row(seat) for seat in asked])
            if logits is None:
                return None
            found |= zip(asked, logits, strict=True)
        for feed in pieces:
            logits = self._replay_piece(self.graphs, feed)
            if logits is None:
                return None
            found[feed.seat] = logits[0]
        chosen = [found[feed.seat] for feed in feeds if feed.wanted]
        return torch.stack(chosen) if chosen else torch.empty(0, 1, device=self._device)

    def _replay_steps(self, graphs: Graphs, steps: Sequence[Feed], wanted: Sequence[Row]) -> torch.Tensor | None:
        rows = [_row(feed.seat) for feed in steps]
        shape = graphs.shape(len(rows), max(len(row.ids) for row in rows) + 1)
        self._exchange(self.rows.to_front(rows, shape.rows))
        tokens = {row.index: (feed.tokens[0], len(row.ids)) for row, feed in zip(rows, steps, strict=True)}
        return graphs.run(shape, tokens, [row.index for row in wanted])

    def _replay_piece(self, graphs: Graphs, feed: Feed) -> torch.Tensor | None:
        row, logits = _row(feed.seat), None
        for begin in range(0, len(feed.tokens), PIECES[-1]):
            tokens, start = feed.tokens[begin : begin + PIECES[-1]], len(row.ids) + begin
            logits = graphs.read(graphs.piece(len(tokens), start + len(tokens)), row.index, start, tokens)
            if logits is None:
                return None
        return logits

    def _compute(self, shape: Shape, inputs: torch.Tensor) -> torch.Tensor:
        """See :class:`Graphs`."""
        ids, positions, places, picked = inputs.unbind()
        if not shape.reads:
            self._cache.place.set(self._indices[: shape.rows], places)
            group = self._groups.first_rows(positions, shape.length)
            return self._logits(ids, positions, [group]).index_select(0, picked)
        row, last = picked[:1], picked[1:2]
        self._cache.place.set(row.expand(shape.tokens), places)
        keep = {"logits_to_keep": last} if self._kinds.keeps_logits else {}
        logits = self._logits(ids, positions, [self._groups.one_row(row, positions, shape.length)], **keep)
        return logits if keep else logits.index_select(0, last)

    def leave(self, seat: Seat, spoilt: bool = False) -> None:
        if seat.row is None:
            return
        if spoilt:
            self._empty(seat.row)
        self.rows.release(seat.row)
        seat.row = None

    def _empty(self, row: Row) -> None:
        self._cache.empty_row(row.index)
        self.rows.empty(row)

    def unread(self, seat: Seat, tokens: int = 1) -> None:
        """Forget the last tokens that the seat read."""
        del _row(seat).ids[-tokens:]

    def reset(self) -> None:
        """Forget everything, after a pass failed; prompts that were being read are read from their beginning."""
        for row in self.rows.by_index:
            self._cache.empty_row(row.index)
            row.ids, row.occupied = [], row.occupied if row.held else 0


def _replays(feed: Feed) -> int:
    return -(-len(feed.tokens) // PIECES[-1])


def _row(seat: Seat) -> Row:
    if seat.row is None:
        raise RuntimeError("a seat without a row was run")
    return seat.row


def piece(seat: Seat, most: int) -> Feed:
    """The next ``most`` tokens of its prompt."""
    done = len(_row(seat).ids)
    return Feed(seat, seat.ids[done : done + most], wanted=done + most == len(seat.ids))
