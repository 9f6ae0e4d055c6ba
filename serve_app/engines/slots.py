"""Continuous batching: one forward pass per step for all running requests, which join and leave at every step.

Each request holds a row of one cache (:mod:`serve_app.engines.cache`, :mod:`serve_app.engines.rows`). Pieces of prompts
travel in the passes of the running streams (:mod:`serve_app.engines.packed`), as much as these can bear; what an
earlier request left in the cache is reused. A prompt with images is read in a pass of its own, and what that leaves
becomes a row like the others; it is never reused.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.domain.errors import ContextLengthExceeded
from serve_app.engines.batch import BatchDecoder
from serve_app.engines.cache import SlotCache
from serve_app.engines.decoding import Begun, Passes
from serve_app.engines.gate import LayerKinds
from serve_app.engines.graphs import Graphs, Record, Shape
from serve_app.engines.groups import Groups
from serve_app.engines.pace import BLOCK, MAX_CHUNK, MAX_CHUNK_GPU, MIN_CHUNK, Pace
from serve_app.engines.packed import Group, Padded, exchanged, together
from serve_app.engines.rows import Row, Rows, common_length
from serve_app.engines.sampling import Sampler
from serve_app.engines.worker import Job

log = logging.getLogger(__name__)

KEPT_ROWS = 16
"""Rows beyond those of running requests, for what finished ones leave."""
WORTH_WAITING = 128
"""Tokens for which a prompt waits until another has read them."""
PATIENCE = 256
"""Tokens by which a prompt seems shorter for each turn that it was passed over: short ones go first, long ones too."""


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
        self.graphs = None if record is None else Graphs(self._step, whole, self._device, record)
        self.replayed = False
        self.pads = not self.on_cpu
        self._unlike = itertools.count(-1, -1)
        self.rows = Rows(rows, budget)
        self.limit = limit
        self.windows = [window for window in kinds.windows.values() if window]

    @property
    def on_cpu(self) -> bool:
        return bool(self._device.type == "cpu")

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

        Steps alone are replayed where there are CUDA graphs and ``replay`` allows it; :attr:`replayed` tells.
        """
        steps = [feed for feed in feeds if len(feed.tokens) == 1]
        pieces = [feed for feed in feeds if len(feed.tokens) > 1]
        batches = self._batches(pieces)
        line = [*steps, *(pieces[number] for batch in batches for number in batch)]
        at = {feed.seat: number for number, feed in enumerate(line)}
        wanted = [at[feed.seat] for feed in feeds if feed.wanted]
        logits = self._replay(steps, wanted) if replay and not pieces else None
        self.replayed = logits is not None
        if logits is None:
            self._bring_together([_row(feed.seat) for feed in steps])
            logits = self._forward(line, len(steps), [len(batch) for batch in batches], wanted)
        for feed in feeds:
            _row(feed.seat).ids += feed.tokens
        return logits

    def _batches(self, pieces: Sequence[Feed]) -> list[list[int]]:
        """Which pieces of prompts share a call of attention: their numbers, in the order of their rows."""
        if not self.pads or len(pieces) < 2:
            return [[number] for number in range(len(pieces))]
        sizes = [(len(feed.tokens), len(_row(feed.seat).ids) + len(feed.tokens)) for feed in pieces]
        return [sorted(batch, key=lambda number: _row(pieces[number].seat).index) for batch in together(sizes)]

    def _bring_together(self, rows: Sequence[Row]) -> None:
        self._exchange(self.rows.swaps(rows))

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

    def _replay(self, steps: Sequence[Feed], wanted: Sequence[int]) -> torch.Tensor | None:
        """What :meth:`_forward` gives for steps alone; None where there is no graph."""
        if self.graphs is None or not self.graphs.active or not steps:
            return None
        rows = [_row(feed.seat) for feed in steps]
        shape = self.graphs.shape(len(rows), max(len(row.ids) for row in rows) + 1)
        self._exchange(self.rows.to_front(rows, shape.rows))
        tokens = {row.index: (feed.tokens[0], len(row.ids)) for row, feed in zip(rows, steps, strict=True)}
        return self.graphs.run(shape, tokens, [rows[number].index for number in wanted])

    def _step(self, shape: Shape, inputs: torch.Tensor) -> torch.Tensor:
        """See :class:`Graphs`."""
        ids, positions, places, wanted = inputs.unbind()
        self._cache.place.set(self._indices[: shape.rows], places)
        return self._logits(ids, positions, [self._groups.first_rows(positions, shape.length)]).index_select(0, wanted)

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

    def unread(self, seat: Seat) -> None:
        """Forget the last token that the seat read."""
        _row(seat).ids.pop()

    def reset(self) -> None:
        """Forget everything, after a pass failed; prompts that were being read are read from their beginning."""
        for row in self.rows.by_index:
            self._cache.empty_row(row.index)
            row.ids, row.occupied = [], row.occupied if row.held else 0


def _row(seat: Seat) -> Row:
    if seat.row is None:
        raise RuntimeError("a seat without a row was run")
    return seat.row


class SlotDecoder:
    """Implements :class:`serve_app.engines.worker.Decoder` with a :class:`SlotLoop`.

    ``adopts``: whether a row can take what a pass of :class:`Passes` leaves; else ``batch`` runs what has images.
    """

    def __init__(self, batch: BatchDecoder, passes: Passes, loop: SlotLoop, places: int, adopts: bool = False) -> None:
        self._batch = batch
        self._adopts = adopts
        self._passes = passes
        self.loop = loop
        self.places: int | None = places
        self.pace = Pace(MAX_CHUNK if loop.on_cpu else MAX_CHUNK_GPU)

    def __repr__(self) -> str:
        return f"SlotDecoder({self.loop.rows!r})"

    @property
    def description(self) -> str:
        graphs = ", CUDA graphs" if self.loop.graphs is not None and self.loop.graphs.active else ""
        return f"continuous batching ({self.places} at once, {self.loop.limit} tokens each){graphs}"

    def ends(self, token: int) -> bool:
        return self._passes.ends(token)

    def release(self, job: Job) -> None:
        if isinstance(job.state, Seat):
            self.loop.leave(job.state, spoilt=bool(job.prompt.inputs))
            job.state = None
        else:
            self._batch.release(job)

    def turn(self, reading: Sequence[Job], running: Sequence[Job]) -> Iterator[Mapping[Job, int | Exception]]:
        """See :class:`Decoder`: one pass for all that are or will be in the slots, then those with images."""
        seated = [job for job in running if isinstance(job.state, Seat)]
        others = [job for job in running if not isinstance(job.state, Seat)]  # who ends in this turn has no seat after
        with torch.inference_mode():
            outcomes = self._shared([job for job in reading if not job.prompt.inputs], seated)
        if outcomes:
            yield outcomes
        pictured = [job for job in reading if job.prompt.inputs]
        if pictured and self._adopts:
            with torch.inference_mode():
                outcome = self._look(pictured.pop(0))
            yield outcome
            pictured = []
        yield from self._batch.turn(pictured, others)

    def _look(self, job: Job) -> dict[Job, int | Exception]:
        """Read a prompt with its images, and take what that leaves into a row."""
        outcomes: dict[Job, int | Exception] = {}
        if not self._open(job, outcomes):
            return outcomes
        try:
            logits, arguments = self._passes.first([Begun.of(job)])
            self.loop.adopt(job.state, arguments["past_key_values"])
        except Exception as fault:  # the border to the libraries
            self.loop.leave(job.state, spoilt=True)
            return {job: fault}
        return dict(zip([job], self._pick([job], logits), strict=True))

    def _shared(self, reading: Sequence[Job], running: Sequence[Job]) -> dict[Job, int | Exception]:
        outcomes: dict[Job, int | Exception] = {}
        ready = [job for job in reading if self._open(job, outcomes)]
        pieces = self._pieces(ready, self.pace.allowance(len(running), len(ready)))
        feeds = [Feed(job.state, job.tokens[-1:]) for job in running]
        feeds += [piece(job.state, most) for job, most in pieces.items()]
        if not feeds:
            return outcomes
        begun = time.perf_counter()
        try:
            logits = self.loop.run(feeds)
        except Exception as fault:  # the border to the libraries
            return outcomes | self._failed(fault, list(pieces), running)
        done = [*running, *(job for job in pieces if not job.state.left)]
        outcomes |= zip(done, self._pick(done, logits), strict=True)
        if not self.loop.replayed:  # a replay tells nothing of what a pass with prompts would take without them
            self.pace.passed(len(running), sum(pieces.values()), time.perf_counter() - begun)
        return outcomes

    def _failed(self, fault: Exception, reading: Sequence[Job], running: Sequence[Job]) -> dict[Job, int | Exception]:
        """What a pass that failed means: for those only whose prompts were in it, if there were any."""
        for job in reading:
            self.loop.leave(job.state, spoilt=True)
        if reading and running:
            return dict.fromkeys(reading, fault)  # the others have lost nothing, and go on without them
        self.loop.reset()
        raise fault

    def _open(self, job: Job, outcomes: dict[Job, int | Exception]) -> bool:
        """Whether the job can be read; if not, why."""
        try:
            if job.state is None:
                ids = [*job.prompt.ids, *job.tokens]
                self._passes.check_ids(ids)
                if job.room > self.loop.limit:
                    raise _too_long(job, self.loop.limit)
                job.state = Seat(ids, job.room, sampler=self._passes.sampler(job))
        except Exception as fault:  # the border to the libraries: one job's fault is not the others'
            outcomes[job] = fault
            return False
        return True

    def _pieces(self, jobs: Sequence[Job], allowance: int) -> dict[Job, int]:
        """How far to read in which prompts now: the shortest and longest-waiting first."""
        pieces: dict[Job, int] = {}
        for job in sorted(
            (job for job in jobs if not self._awaits(job, jobs)),
            key=lambda job: job.state.left - PATIENCE * job.state.passed_over,
        ):
            if pieces and allowance < min(MIN_CHUNK, job.state.left):
                job.state.passed_over += 1
                continue
            if job.state.row is None:
                self._sit(job)
            pieces[job] = min(job.state.left, allowance)
            allowance -= pieces[job]
        return pieces

    def _sit(self, job: Job) -> None:
        self.loop.sit(job.state)
        job.cached = job.state.cached

    def _awaits(self, job: Job, jobs: Sequence[Job]) -> bool:
        """Whether another job is reading what this one begins with too: then it is better to wait and reuse that."""
        seat = job.state
        before = jobs[: jobs.index(job)]  # only those, so that nobody waits in a circle
        if seat.row is not None or not before:
            return False
        soon = max(common_length(seat.ids, other.state.ids) for other in before)
        return soon > WORTH_WAITING and soon > self.loop.rows.common(seat.ids) + WORTH_WAITING

    def _pick(self, jobs: Sequence[Job], logits: torch.Tensor) -> list[int | Exception]:
        """The next token of each job from ``[jobs, vocabulary]``; those that only want the likeliest in one call."""
        likeliest: list[int | Exception] = logits.argmax(dim=-1).tolist()
        if all(job.state.sampler.plain for job in jobs):
            return likeliest
        return [
            token if job.state.sampler.plain else self._sample(job, row)
            for job, row, token in zip(jobs, logits, likeliest, strict=True)
        ]

    def _sample(self, job: Job, logits: torch.Tensor) -> int | Exception:
        try:
            ids = [*job.prompt.ids, *job.tokens] if job.state.sampler.needs_ids else ()
            return int(job.state.sampler.pick(logits, ids))
        except Exception as fault:  # the border to the libraries: one job's fault is not the others'
            return fault


def piece(seat: Seat, most: int) -> Feed:
    """The next ``most`` tokens of its prompt."""
    done = len(_row(seat).ids)
    return Feed(seat, seat.ids[done : done + most], wanted=done + most == len(seat.ids))


def _too_long(job: Job, limit: int) -> Exception:
    return ContextLengthExceeded(
        f"Prompt and reply may have {job.room} tokens; the model holds {limit}. Shorten the message or the history.",
        details={"promptTokens": len(job.prompt.ids), "contextLength": limit, "maxTokens": job.prompt.max_tokens},
    )
