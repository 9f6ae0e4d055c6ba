"""Left-padded micro-batches: what ``generate`` does for many texts, one token at a time.

For what the slots cannot serve: encoders, state-space and linear attention, ALiBi, prompts with images. Requests that
wait together form a *cohort*: their prompts are read in one pass, and each step is one pass for the cohort. Who comes
later forms another one beside it. A request that ends leaves its row; when half of a cohort's rows are empty, it is
made smaller where the cache allows that. Sampling, seeds, stop strings and cancellation are each request's own.

A trial at load (:meth:`serve_app.engines.decoding.Passes.check_padding`) shows whether padding changes the tokens. If
it does, or if the model keeps state of a request outside its cache, every cohort has one request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engines.decoding import Begun, Passes
from serve_app.engines.sampling import Sampler
from serve_app.engines.worker import Job

WASTE = 1.5
"""How many times the tokens of a cohort's prompts its padded prompts may have."""


@dataclass(eq=False, slots=True)
class Cohort:
    """``rows``: the request in each row of the passes, None where it has left."""

    rows: list[Job | None]
    arguments: dict[str, Any]

    @property
    def jobs(self) -> list[Job]:
        return [job for job in self.rows if job is not None]

    def shrink(self) -> None:
        """Drop the empty rows, once they are half of all and if the cache can do that."""
        cache: Any = self.arguments.get("past_key_values")
        if 2 * len(self.jobs) > len(self.rows) or not _selects_rows(cache):
            return
        before = len(self.rows)
        kept = torch.tensor([index for index, job in enumerate(self.rows) if job is not None])
        cache.batch_select_indices(kept)
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor) and value.shape[:1] == (before,):
                self.arguments[name] = value[kept]
        encoded = self.arguments.get("encoder_outputs")
        if encoded is not None:
            encoded.last_hidden_state = encoded.last_hidden_state[kept]
        self.rows = [*self.jobs]


def _selects_rows(cache: Any) -> bool:
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    caches = [part for part in parts if part is not None] or [cache]
    return all(hasattr(layer, "batch_select_indices") for part in caches for layer in getattr(part, "layers", [None]))


@dataclass(eq=False, slots=True)
class Member:
    """A job's place: its sampler and its cohort."""

    sampler: Sampler
    cohort: Cohort | None = None


class BatchDecoder:
    """Implements :class:`serve_app.engines.worker.Decoder` for every model that ``generate`` runs.

    Args:
        most: requests in a cohort.
        reason: why the model gets no better decoder.
    """

    def __init__(self, passes: Passes, most: int, reason: str | None = None) -> None:
        self._passes = passes
        self._most = most if passes.cached and not passes.keeps_state else 1
        self.reason = reason
        self.places = 1 if passes.keeps_state else None

    def __repr__(self) -> str:
        return f"BatchDecoder({self.description!r})"

    @property
    def description(self) -> str:
        ways = {1: "a pass per request"} if self.places is None else {1: "one request at a time"}
        way = ways.get(self._most, f"micro-batches of up to {self._most}")
        why = f" ({self.reason})" if self.reason else ""
        return f"{way}{'' if self._passes.cached else ', no cache'}{why}"

    def ends(self, token: int) -> bool:
        return self._passes.ends(token)

    def release(self, job: Job) -> None:
        member: Member | None = job.state
        if member is not None and member.cohort is not None:
            rows = member.cohort.rows
            rows[rows.index(job)] = None
        job.state = None

    def turn(self, reading: Sequence[Job], running: Sequence[Job]) -> Iterator[Mapping[Job, int | Exception]]:
        """See :class:`Decoder`: the prompts of one new cohort, then a step of each that there is."""
        if reading:
            yield self._begin(self._together(reading))
        for cohort in dict.fromkeys(job.state.cohort for job in running):
            yield self._step(cohort)

    def _together(self, reading: Sequence[Job]) -> list[Job]:
        """The oldest, and those that can be read with it: of one shape, and not too different in length."""
        group = [reading[0]]
        wanted = Begun.of(group[0]).shape
        for job in reading[1:]:
            lengths = [len(other.prompt.ids) for other in (*group, job)]
            if (
                len(group) < self._most
                and max(lengths) * len(lengths) <= WASTE * sum(lengths)
                and Begun.of(job).shape == wanted
            ):
                group.append(job)
        return group

    def _begin(self, group: Sequence[Job]) -> dict[Job, int | Exception]:
        outcomes: dict[Job, int | Exception] = {}
        fit = [job for job in group if self._open(job, outcomes)]
        if not fit:
            return outcomes
        try:
            with torch.inference_mode():
                return outcomes | self._read(fit)
        except Exception as fault:  # the border to the libraries
            if len(fit) == 1:
                return outcomes | {fit[0]: fault}
        for job in fit:  # whose fault it was shows when each is alone
            outcomes |= self._begin([job])
        return outcomes

    def _open(self, job: Job, outcomes: dict[Job, int | Exception]) -> bool:
        """Whether the job can be read; if not, why."""
        try:
            self._passes.check_ids([*job.prompt.ids, *job.tokens])
            job.state = Member(self._passes.sampler(job))
        except Exception as fault:  # the border to the libraries: one job's fault is not the others'
            outcomes[job] = fault
            return False
        return True

    def _read(self, jobs: Sequence[Job]) -> dict[Job, int | Exception]:
        logits, arguments = self._passes.first([Begun.of(job) for job in jobs])
        cohort = Cohort([*jobs], arguments)
        for job in jobs:
            job.state.cohort = cohort
        return {job: self._pick(job, row) for job, row in zip(jobs, logits, strict=True)}

    def _step(self, cohort: Cohort) -> dict[Job, int | Exception]:
        jobs = cohort.jobs
        try:
            with torch.inference_mode():
                if not self._passes.cached:
                    return {job: self._pick(job, self._passes.reread(Begun.of(job))) for job in jobs}
                cohort.shrink()
                newest = [job.tokens[-1] if job is not None else 0 for job in cohort.rows]
                logits, cohort.arguments = self._passes.next(newest, cohort.arguments)
                return {
                    job: self._pick(job, row) for job, row in zip(cohort.rows, logits, strict=True) if job is not None
                }
        except Exception as fault:  # the border to the libraries: the other cohorts go on
            return dict.fromkeys(jobs, fault)

    def _pick(self, job: Job, logits: torch.Tensor) -> int | Exception:
        sampler: Sampler = job.state.sampler
        try:
            return sampler.pick(logits, self._passes.decoder_ids(job) if sampler.needs_ids else ())
        except Exception as fault:  # the border to the libraries: one job's fault is not the others'
            return fault
