"""Continuous batching: one forward pass per step for all running requests, which join and leave at every step.

Each request holds a row of one cache (:mod:`serve_app.engines.cache`, :mod:`serve_app.engines.rows`). Pieces of prompts
travel in the passes of the running streams (:mod:`serve_app.engines.packed`), as much as these can bear; what an
earlier request left in the cache is reused. A prompt with images is read in a pass of its own, and what that leaves
becomes a row like the others; it is never reused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from serve_app.domain.errors import ContextLengthExceeded
from serve_app.engines.batch import BatchDecoder
from serve_app.engines.decoding import Begun, Passes
from serve_app.engines.loop import Feed, Seat, SlotLoop, piece
from serve_app.engines.pace import BURST, MAX_CHUNK, MAX_CHUNK_GPU, MIN_CHUNK, Pace
from serve_app.engines.rows import common_length
from serve_app.engines.worker import Job

KEPT_ROWS = 16
"""Rows beyond those of running requests, for what finished ones leave."""
WORTH_WAITING = 128
"""Tokens for which a prompt waits until another has read them."""
PATIENCE = 256
"""Tokens by which a prompt seems shorter for each turn that it was passed over: short ones go first, long ones too."""


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
        self.pace = Pace(MAX_CHUNK, BURST) if loop.on_cpu else Pace(MAX_CHUNK_GPU)

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
        if self.loop.tells(len(running)):
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


def _too_long(job: Job, limit: int) -> Exception:
    return ContextLengthExceeded(
        f"Prompt and reply may have {job.room} tokens; the model holds {limit}. Shorten the message or the history.",
        details={"promptTokens": len(job.prompt.ids), "contextLength": limit, "maxTokens": job.prompt.max_tokens},
    )
