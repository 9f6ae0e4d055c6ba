"""Continuous batching: one forward pass per step for all running requests, which join and leave at every step.

Each request holds a row of one cache (:mod:`serve_app.engines.cache`, :mod:`serve_app.engines.rows`). Prompts are read
in chunks beside the running streams, several short ones in one pass; what an earlier request left in the cache is
reused. Requests with images, and models that do not pass :mod:`serve_app.engines.gate`, go one pass per request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.domain.errors import ContextLengthExceeded
from serve_app.engines.cache import SlotCache
from serve_app.engines.decoding import SoloDecoder
from serve_app.engines.gate import LayerKinds
from serve_app.engines.rows import Row, Rows, common_length
from serve_app.engines.sampling import Sampler
from serve_app.engines.worker import Job

log = logging.getLogger(__name__)

KEPT_ROWS = 16
"""Rows beyond those of running requests, for what finished ones leave."""
BLOCK = 16
"""Lengths are rounded to a multiple of this, so that shapes repeat."""
WORTH_WAITING = 128
"""Tokens for which a prompt waits until another has read them."""
MIN_CHUNK, MAX_CHUNK = 16, 512
SHARE = 0.8
"""Of a step's time that reading may take beside it, on average: single passes vary."""
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


class Pace:
    """How many tokens of prompts one turn may read, so that running streams wait no longer than their own step takes.

    When newcomers outnumber the running streams, more of them wait than would be kept waiting: they get more, by the
    square of the ratio. Times are smoothed over a few turns.
    """

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._token_s: float | None = None

    def stepped(self, seconds: float) -> None:
        self._step_s = _smooth(self._step_s, seconds)

    def read(self, tokens: int, seconds: float) -> None:
        self._token_s = _smooth(self._token_s, seconds / tokens)

    def allowance(self, running: int, reading: int) -> int:
        """Tokens, a multiple of :data:`BLOCK`."""
        if not running or self._step_s is None or self._token_s is None:
            return MAX_CHUNK
        tokens = int(SHARE * self._step_s / self._token_s * max(1.0, reading / running) ** 2)
        return min(MAX_CHUNK, max(MIN_CHUNK, tokens // BLOCK * BLOCK))


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else 0.8 * old + 0.2 * new


class SlotLoop:
    """The arithmetic on seats; knows no jobs.

    Args:
        model: of transformers, in evaluation mode; passed the gate.
        kinds: its layers' kinds of attention.
        rows: of the cache.
        limit: tokens that one row may come to hold.
        budget: tokens that all rows may occupy together.
    """

    def __init__(self, model: Any, kinds: LayerKinds, rows: int, limit: int, budget: int) -> None:
        self._model = model
        self._kinds = kinds
        self._limit = limit
        self._capacity = -(-(limit + 1) // BLOCK) * BLOCK  # the place after the last token takes what nobody reads
        self._device = model.device
        self._lowest = torch.finfo(model.dtype).min
        self._places = torch.arange(self._capacity, device=self._device)
        self._cache = SlotCache(len(kinds.layers), rows, self._capacity, self._device)
        self.rows = Rows(rows, budget)
        self.limit = limit
        self.windows = [window for window in kinds.windows.values() if window]

    def sit(self, seat: Seat) -> None:
        """Give it a row, with as much of its prompt as is already in the cache."""
        taken = self.rows.take(seat.ids, seat.room)
        for row in taken.emptied:
            self._cache.empty_row(row.index)
        if taken.source is not None and taken.source is not taken.row:
            self._cache.copy_row(taken.source.index, taken.row.index, taken.common)
        seat.row, seat.cached = taken.row, taken.common

    def read(self, seats: Sequence[Seat], most: int) -> torch.Tensor:
        """Read up to ``most`` further tokens of each prompt; the logits ``[seats, vocabulary]`` after them."""
        rows = [_row(seat) for seat in seats]
        parts = [seat.ids[len(row.ids) : len(row.ids) + most] for seat, row in zip(seats, rows, strict=True)]
        logits = self._forward([row.index for row in rows], parts, [len(row.ids) for row in rows])
        for row, part in zip(rows, parts, strict=True):
            row.ids += part
        return logits

    def step(self, seats: Sequence[Seat], tokens: Sequence[int]) -> torch.Tensor:
        """Feed each seat its newest token; the logits ``[seats, vocabulary]`` after it."""
        rows = [_row(seat) for seat in seats]
        for moved, other in self.rows.swaps(rows):
            self._cache.swap_rows(other.index, moved.index, (len(moved.ids), len(other.ids)))
            if not other.occupied:
                self._cache.empty_row(other.index)
        first, last = min(row.index for row in rows), max(row.index for row in rows)
        # Rows of others in between run along: what they write lies behind all that they hold.
        feed = {row.index: [token] for row, token in zip(rows, tokens, strict=True)}
        span = self.rows.by_index[first : last + 1]
        longest = max(len(row.ids) for row in rows)
        logits = self._forward(
            [row.index for row in span], [feed.get(row.index, [0]) for row in span], [len(row.ids) for row in span],
            longest,
        )  # fmt: skip
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
        return logits if len(span) == len(rows) and rows == span else logits[[row.index - first for row in rows]]

    def _forward(
        self, rows: Sequence[int], parts: Sequence[Sequence[int]], starts: Sequence[int], longest: int | None = None
    ) -> torch.Tensor:
        """The logits ``[rows, vocabulary]`` after the last token of each part.

        Args:
            parts: new tokens of each row; shorter ones are padded behind, where later tokens overwrite it.
            starts: tokens that each row holds already.
            longest: the most of ``starts`` that count; attention looks no further.
        """
        width = max(map(len, parts))
        ids = torch.tensor([[*part, *[0] * (width - len(part))] for part in parts], device=self._device)
        positions = torch.tensor(starts, device=self._device)[:, None] + self._places[:width]
        positions.clamp_(max=self._capacity - 1)
        end = (max(starts) if longest is None else longest) + width
        length = min(-(-end // BLOCK) * BLOCK, self._capacity)
        self._cache.place.set(rows, positions, length)
        ends = [len(part) - 1 for part in parts]
        keep, chosen = self._keep(ends, width)
        logits: torch.Tensor = self._model(
            input_ids=ids,
            position_ids=positions.clamp(max=self._limit - 1),
            past_key_values=self._cache,
            use_cache=True,
            attention_mask=self._mask(positions, length),
            **keep,
        ).logits
        return logits[:, 0] if chosen is None else logits[self._places[: len(rows)], chosen]

    def _keep(self, ends: Sequence[int], width: int) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Which places of a pass get logits, and for each row the one of them that is its own."""
        if width == 1:
            return {}, None
        if not self._kinds.keeps_logits:
            return {}, torch.tensor(ends, device=self._device)
        if set(ends) == {width - 1}:
            return {"logits_to_keep": 1}, None
        distinct = sorted(set(ends))
        chosen = torch.tensor([distinct.index(end) for end in ends], device=self._device)
        return {"logits_to_keep": torch.tensor(distinct, device=self._device)}, chosen

    def _mask(self, positions: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive, ``[rows, 1, new tokens, length]``; one for each kind of attention where there are several."""
        keys, queries = self._places[:length], positions.clamp(max=length - 1)[:, None, :, None]
        past = keys <= queries
        masks = {}
        for kind, window in self._kinds.windows.items():
            seen = past
            if kind == "sliding_attention":
                seen = past & (keys > queries - window)
            elif kind == "chunked_attention":
                seen = past & (keys // window == queries // window)
            masks[kind] = torch.zeros(seen.shape, dtype=self._model.dtype, device=self._device)
            masks[kind].masked_fill_(~seen, self._lowest)
        return masks if len(masks) > 1 else next(iter(masks.values()))

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
    """Implements :class:`serve_app.engines.worker.Decoder` with a :class:`SlotLoop`; ``solo`` runs what has images."""

    def __init__(self, solo: SoloDecoder, loop: SlotLoop, places: int) -> None:
        self._solo = solo
        self.loop = loop
        self.places: int | None = places
        self._pace = Pace()

    def __repr__(self) -> str:
        return f"SlotDecoder({self.loop.rows!r})"

    @property
    def description(self) -> str:
        return f"continuous batching ({self.places} at once, {self.loop.limit} tokens each)"

    def ends(self, token: int) -> bool:
        return self._solo.ends(token)

    def release(self, job: Job) -> None:
        if isinstance(job.state, Seat):
            self.loop.leave(job.state)
            job.state = None
        else:
            self._solo.release(job)

    def start(self, jobs: Sequence[Job]) -> list[int | Exception | None]:
        """See :class:`Decoder`: one pass over the prompts that it pays to read together now."""
        with torch.inference_mode():
            if jobs[0].prompt.inputs:
                return self._solo.start(jobs)
            outcomes: dict[Job, int | Exception] = {}
            group, most = self._group([job for job in jobs if not job.prompt.inputs and self._open(job, outcomes)])
            if group:
                outcomes |= self._read(group, most, alone=len(group) == len(jobs))
            return [outcomes.get(job) for job in jobs]

    def _open(self, job: Job, outcomes: dict[Job, int | Exception]) -> bool:
        """Whether the job can be read; if not, why."""
        try:
            if job.state is None:
                ids = [*job.prompt.ids, *job.tokens]
                self._solo.check_ids(ids)
                if job.room > self.loop.limit:
                    raise _too_long(job, self.loop.limit)
                job.state = Seat(ids, job.room, sampler=self._solo.sampler(job, len(job.prompt.ids)))
        except Exception as fault:  # the border to the libraries: one job's fault is not the others'
            outcomes[job] = fault
            return False
        return True

    def _group(self, jobs: Sequence[Job]) -> tuple[list[Job], int]:
        """The jobs to read now, and how far: the shortest and longest-waiting first, then what fits beside it."""
        running = len(self.loop.rows.held) - sum(job.state.row is not None for job in jobs)
        allowance = self._pace.allowance(running, len(jobs))
        ready = [job for job in jobs if not self._awaits(job, jobs)]
        ready.sort(key=lambda job: job.state.left - PATIENCE * job.state.passed_over)
        group: list[Job] = []
        width = 0
        for job in ready:
            if job.state.row is None:
                self._sit(job)
            left = min(job.state.left, allowance)
            if group and ((len(group) + 1) * max(width, left) > allowance or 2 * min(width, left) < max(width, left)):
                job.state.passed_over += 1
                continue
            group.append(job)
            width = max(width, left)
        return group, width

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

    def _read(self, group: Sequence[Job], most: int, alone: bool) -> dict[Job, int | Exception]:
        begun = time.perf_counter()
        try:
            logits = self.loop.read([job.state for job in group], most)
        except Exception as fault:  # the border to the libraries
            for job in group:
                self.loop.leave(job.state, spoilt=True)
            if alone:
                raise
            return dict.fromkeys(group, fault)
        done = [job for job in group if not job.state.left]
        found = self._pick(done, logits[[index for index, job in enumerate(group) if job in done]]) if done else []
        self._pace.read(most * len(group), time.perf_counter() - begun)
        return dict(zip(done, found, strict=True))

    def advance(self, jobs: Sequence[Job]) -> list[int | Exception]:
        """See :class:`Decoder`: one pass for all that are in the slots."""
        with torch.inference_mode():
            seated = [job for job in jobs if isinstance(job.state, Seat)]
            others = [job for job in jobs if not isinstance(job.state, Seat)]
            found: dict[Job, int | Exception] = {}
            if seated:
                found |= zip(seated, self._step(seated, alone=not others), strict=True)
            if others:
                found |= zip(others, self._solo.advance(others), strict=True)
            return [found[job] for job in jobs]

    def _step(self, jobs: Sequence[Job], alone: bool) -> list[int | Exception]:
        begun = time.perf_counter()
        try:
            logits = self.loop.step([job.state for job in jobs], [job.tokens[-1] for job in jobs])
        except Exception as fault:  # the border to the libraries
            self.loop.reset()
            if alone:
                raise
            return [fault] * len(jobs)
        found = self._pick(jobs, logits)
        self._pace.stepped(time.perf_counter() - begun)
        return found

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


def _too_long(job: Job, limit: int) -> Exception:
    return ContextLengthExceeded(
        f"Prompt and reply may have {job.room} tokens; the model holds {limit}. Shorten the message or the history.",
        details={"promptTokens": len(job.prompt.ids), "contextLength": limit, "maxTokens": job.prompt.max_tokens},
    )
