"""What becomes of a reply's few timestamps: its :class:`Timing`, the spans of its way and the figures on them.

:class:`Record` is the ingress's side, :func:`in_replica` the replica's. Neither does anything per token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from opentelemetry.util.types import AttributeValue

from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import RotundaError
from serve_app.domain.events import Loading, Queued
from serve_app.domain.generation import Accepted, Delta, Finish, GenerationRequest, Marks, Timing, Usage
from serve_app.domain.routing import Candidate
from serve_app.telemetry import semconv
from serve_app.telemetry.logs import about
from serve_app.telemetry.propagation import TraceContext, from_carrier
from serve_app.telemetry.tracing import CLIENT, Attributes, Tracing, Trail, error_type
from serve_app.telemetry.waits import Wait

Request = TypeVar("Request", GenerationRequest, EmbeddingRequest)

SENT = "rotunda-sent"
"""In the carrier: when the call was made, in nanoseconds since the epoch."""


class Record:
    """The clock and the trail of one reply. As a context manager it ends the span ``chat {model}``, however that ends;
    of vectors, ``embeddings {model}``.

    Args:
        trail: of the request that wants the reply.
        request: what the model is asked.
        clock: monotonic seconds.
    """

    def __init__(self, trail: Trail, request: GenerationRequest | EmbeddingRequest, clock: Callable[[], float]) -> None:
        self.trail = trail
        self.started = clock()
        self.first: float | None = None
        self.carrier: Mapping[str, str] = trail.carrier()
        """Of the present attempt."""
        self._clock = clock
        self._request = request
        self.admitted: float | None = None
        """When the router granted the request."""
        self._called, self._called_ns = self.started, time.time_ns()
        self._free_ns: int | None = None
        """When the last thing before the next attempt ended. Nothing is waited for in between, but a busy machine may
        take the processor away there: that time belongs to the attempt."""
        self._accepted_ns: int | None = None
        self._load_s = self._queue_load_s = 0.0
        self._waited = self._loading = False
        self._wait: Wait | None = None
        self._about: dict[str, AttributeValue | None] = {}
        self._chat: Trail | None = None
        self._attempt = trail
        self._attempts = 0
        self._last: TraceContext | None = None
        self._candidate: Candidate | None = None
        self._finish: Finish | None = None
        self._vectors: Embeddings | None = None
        self._read: int | None = None
        self._made = _spent(request)
        """Tokens that the model has read, None before it has, and those that were made of the reply so far."""
        self._deltas: list[Delta] = []

    def __enter__(self) -> Record:
        return self

    @property
    def below(self) -> Trail:
        """Where the present phase hangs: the reply's own span, once there is one."""
        return self._chat or self.trail

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Until the router grants the request."""
        try:
            with self._waiting(self.below):
                yield
        finally:
            self.admitted = self.admitted or self._clock()

    @contextmanager
    def securing(self) -> Iterator[None]:
        """Until the router grants another candidate than the one that it granted at first."""
        with self._waiting(self.below):
            yield

    @contextmanager
    def _waiting(self, below: Trail) -> Iterator[None]:
        with below.phase("rotation.wait") as trail:
            self._wait = Wait(trail, self._clock)
            try:
                yield
            finally:
                self._wait.end()
        self._free_ns = time.time_ns()

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """While the order of the candidates is decided."""
        with self.trail.phase("route.decide"):
            yield
        self._free_ns = time.time_ns()

    def heard(self, news: Queued | Loading) -> None:
        """What the request waits for."""
        self._waited = True
        if self._wait is not None:
            self._wait.heard(news)

    def loaded(self, seconds: float) -> None:
        """The request waited for so long until its model was in memory."""
        self._load_s += seconds
        if self.admitted is None:
            self._queue_load_s += seconds

    def chosen(self, candidates: tuple[Candidate, ...]) -> None:
        """The models that will be tried, in this order: the reply begins."""
        operation = _operation(self._request)
        self._about = {semconv.OPERATION: operation, **_asked(self._request, candidates), **self.trail.about}
        self._chat = self.trail.child(
            f"{operation} {candidates[0].name}",
            CLIENT,
            attributes=self._about,
            start_ns=self._free_ns,
            span_id=_span_id(self._request.request_id),
        )
        if self._chat.captures and isinstance(self._request, GenerationRequest):
            self._chat.note(
                {
                    semconv.INPUT_MESSAGES: _messages(
                        *((message.role.value, message.text) for message in self._request.messages)
                    )
                }
            )

    @contextmanager
    def attempt(self, candidate: Candidate) -> Iterator[None]:
        """One call to one model; it is linked to the one that it repeats."""
        self._attempts += 1
        self._candidate = candidate
        about(model=candidate.name, provider=candidate.entry.provider)
        self._called, self._called_ns = self._clock(), self._free_ns or time.time_ns()
        self._accepted_ns = None
        self._loading = not candidate.resident
        self._attempt = trail = self.below.child(
            f"attempt {self._attempts}",
            CLIENT,
            {} if self._last is None else {"retried": self._last},
            {semconv.ATTEMPT: self._attempts, semconv.MODEL: candidate.name, semconv.REASON: candidate.reason},
            start_ns=self._called_ns,
        )
        self.carrier, self._last = trail.carrier() | {SENT: str(self._called_ns)}, trail.context
        try:
            yield
        except BaseException as error:
            self._loaded()
            self._heard_out()
            trail.end(error)
            raise
        else:
            self._heard_out()
            trail.end()
        finally:
            self._free_ns = time.time_ns()

    def _heard_out(self) -> None:
        """The present attempt is over. What it said was read all the while, and on its way after the replica's end."""
        if self._accepted_ns is not None:
            self._attempt.past("stream.read", self._accepted_ns, time.time_ns())

    def _loaded(self) -> None:
        """The wait of the present attempt for its model to come into memory is over, if it was one."""
        if self._loading:
            self._attempt.past("load.wait", self._called_ns, time.time_ns())
        self._loading = False

    @contextmanager
    def backing_off(self) -> Iterator[None]:
        """Between two attempts."""
        with self.below.phase("retry.wait"):
            yield
        self._free_ns = time.time_ns()

    def accepted(self, item: Accepted) -> None:
        """The model has taken the prompt; one that was not in memory before is now."""
        self._read, self._accepted_ns = item.prompt_tokens, time.time_ns()
        self._waited = self._waited or self._loading
        self._load_s += self._clock() - self._called if self._loading else 0.0
        self._loaded()
        load = from_carrier(item.load) if self._waited else None
        if load is not None:
            self.trail.link("load", load)

    def said(self, delta: Delta) -> None:
        self.first = self.first or self._clock()
        self._made += delta.tokens
        if self._chat is not None and self._chat.captures:
            self._deltas.append(delta)

    def finished(self, finish: Finish) -> Timing:
        """The reply is whole."""
        self._finish = finish
        return self.timing()

    def embedded(self, vectors: Embeddings) -> Embeddings:
        """The vectors are there."""
        self._vectors = vectors
        return vectors

    @property
    def usage(self) -> Usage | None:
        """The tokens of the reply, of one that broke off those that there were; None before a model has it, and where
        another ingress goes on with it."""
        if self.trail.moved:
            return None
        if self._finish is not None:
            return self._finish.usage
        if self._vectors is not None:
            return Usage(self._vectors.prompt_tokens)
        return None if self._read is None else Usage(self._read, self._made)

    def timing(self) -> Timing:
        """Where the time went, up to now."""
        now = self._clock()
        engine_queue = self._finish.timing.queue_s if self._finish else 0.0
        waited = max(0.0, (self.admitted or now) - self.started - self._queue_load_s)
        return Timing(
            queued_s=waited + engine_queue,
            load_s=self._load_s,
            ttft_s=None if self.first is None else self.first - self.started,
            decode_s=0.0 if self.first is None else now - self.first,
            total_s=now - self.started,
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._chat is None:
            return
        timing, usage = self.timing(), self.usage
        told = _told(timing, self._candidate, self._finish, usage)
        if self._vectors is not None:
            told |= {semconv.OUTPUT_TOKENS: None, semconv.DIMENSIONS: len(self._vectors.vectors[0])}
        self._chat.note(told)
        if self._deltas:
            self._chat.note({semconv.OUTPUT_MESSAGES: _messages(("assistant", Delta.joined(self._deltas).text))})
        whole = self._finish is not None or self._vectors is not None
        if whole:
            error = None  # whoever closes the iterator after the last step cancels nothing
        self._chat.end(error)
        if self.trail.metrics is not None and not self.trail.moved:
            failed = error_type(error) if isinstance(error, Exception) else None
            self.trail.metrics.reply({**self._about, **told}, timing, usage, failed, whole)


@contextmanager
def in_replica(tracing: Tracing, request: Request, model: str, remote: bool = False) -> Iterator[Request]:
    """The span ``generate {model}`` (``embed {model}``) of a request in the replica that serves it, with the engine's
    phases below it.

    Args:
        remote: whether the model runs elsewhere: then only the wait for the first text and what follows can be told.

    Yields:
        The request as the engine gets it: with marks to fill in, and the carrier for whatever it calls.
    """
    work = "generate" if isinstance(request, GenerationRequest) else "embed"
    trail = tracing.continued(f"{work} {model}", request.trace, sent=request.trace.get(SENT))
    offset_ns, began = _epoch_offset_ns(), time.monotonic()
    about(trace_id=trail.trace_id, model=model)
    marks = Marks()
    failure: BaseException | None = None
    try:
        yield replace(request, trace=trail.carrier(), marks=marks)
    except BaseException as error:
        failure = error
        raise
    finally:
        for name, start, end in _phases(marks, began, time.monotonic(), remote):
            trail.past(name, int(start * 1e9) + offset_ns, int(end * 1e9) + offset_ns)
        trail.end(failure)


def _epoch_offset_ns() -> int:
    """What the monotonic clock lacks to tell nanoseconds since the epoch.

    A thread that loses the processor between two readings would shift every phase by that time: hence the closest
    two of a few.
    """
    readings = ((time.monotonic_ns(), time.time_ns(), time.monotonic_ns()) for _ in range(3))
    before, epoch, after = min(readings, key=lambda reading: reading[2] - reading[0])
    return epoch - (before + after) // 2


class Load:
    """The trace of a model that comes into memory: a span for the whole, and one for each of its parts."""

    def __init__(self, tracing: Tracing, model: str) -> None:
        self._model, self._began = model, time.monotonic()
        self._metrics = tracing.metrics
        self._trail = tracing.alone(f"model.load {model}", {semconv.MODEL: model})
        self._parts: dict[str, Trail] = {}
        self.carrier = self._trail.carrier()
        """For the requests that waited for it."""

    def progress(self, part: str, fraction: float) -> None:
        """A part ("permit", "find", "import", "weights", "warmup") has come so far, from 0 to 1. From any thread.

        One part follows the other; what lies between two belongs to the earlier one.
        """
        if part not in self._parts:
            for earlier in self._parts.values():
                earlier.end()
            self._parts[part] = self._trail.child(f"model.{part}")

    def end(self, failure: RotundaError | None) -> None:
        for part in self._parts.values():
            part.end(failure)
        self._trail.end(failure)
        seconds = time.monotonic() - self._began
        self._metrics.loaded(self._model, seconds, None if failure is None else error_type(failure))


def _phases(marks: Marks, began: float, ended: float, remote: bool) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of every phase that the request reached."""
    # An event loop's clock may lag behind the real one by a turn of the loop.
    started = began if remote else min(max(marks.started or ended, began), ended)
    first = min(max(marks.first or ended, started), ended)
    if remote:
        yield "upstream.wait", began, first
    else:
        yield "engine.queue", began, started
        if marks.started is not None:
            yield "prefill", started, first
    if marks.first is not None:
        yield ("upstream.stream" if remote else "decode"), first, ended


def _operation(request: GenerationRequest | EmbeddingRequest) -> str:
    if isinstance(request, EmbeddingRequest):
        return semconv.EMBEDDINGS
    return semconv.TEXT_COMPLETION if request.raw else semconv.CHAT


def _spent(request: GenerationRequest | EmbeddingRequest) -> int:
    """Tokens that another ingress has made of the reply."""
    begun = request.continuation if isinstance(request, GenerationRequest) else None
    return begun.spent if begun else 0


def _asked(request: GenerationRequest | EmbeddingRequest, candidates: tuple[Candidate, ...]) -> Attributes:
    asked = {
        semconv.PROVIDER: candidates[0].entry.provider,
        semconv.REQUEST_MODEL: request.model or candidates[0].name,
    }
    if isinstance(request, EmbeddingRequest):
        return {**asked, semconv.REQUEST_ENCODING_FORMATS: [request.encoding]}
    options = request.options
    return {
        **asked,
        semconv.RESPONSE_ID: request.request_id,
        semconv.OUTPUT_TYPE: "json" if options.response_format else "text",
        semconv.REQUEST_TEMPERATURE: options.temperature,
        semconv.REQUEST_TOP_P: options.top_p,
        semconv.REQUEST_TOP_K: options.top_k,
        semconv.REQUEST_MAX_TOKENS: options.max_tokens,
        semconv.REQUEST_SEED: options.seed,
        semconv.REQUEST_FREQUENCY_PENALTY: options.frequency_penalty,
        semconv.REQUEST_PRESENCE_PENALTY: options.presence_penalty,
        semconv.CANDIDATES: [candidate.name for candidate in candidates],
    }


def _told(
    timing: Timing, candidate: Candidate | None, finish: Finish | None, usage: Usage | None
) -> dict[str, AttributeValue | None]:
    """What is known at the end; usage stands on this span and on no other."""
    return {
        semconv.PROVIDER: candidate.entry.provider if candidate else None,
        semconv.RESPONSE_MODEL: candidate.name if candidate else None,
        semconv.FINISH_REASONS: [finish.reason.value] if finish else None,
        semconv.INPUT_TOKENS: usage.prompt_tokens if usage else None,
        semconv.OUTPUT_TOKENS: usage.completion_tokens if usage else None,
        semconv.CACHED_TOKENS: usage.cached_tokens if usage else None,
        semconv.TIME_TO_FIRST_CHUNK: timing.ttft_s,
        semconv.QUEUED_MS: round(timing.queued_s * 1000, 1),
        semconv.LOAD_MS: round(timing.load_s * 1000, 1),
        semconv.DECODE_MS: round(timing.decode_s * 1000, 1),
    }


def _span_id(request_id: str) -> int | None:
    """See :meth:`TraceContext.of_session`."""
    try:
        return int(request_id[:16], 16) if len(request_id) >= 32 else None
    except ValueError:
        return None


def _messages(*said: tuple[str, str]) -> str:
    """Roles and texts in the convention's form (its JSON schemas of input and output messages)."""
    told = [{"role": role, "parts": [{"type": "text", "content": text}]} for role, text in said]
    return json.dumps(told, ensure_ascii=False)
