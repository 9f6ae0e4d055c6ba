"""The durable log of a stream: events as rows, rows as events, and where a reader who has seen more must go back to.

A stream's events are numbered from 1. Its owner writes them in batches; what the owner had sent and not yet written is
lost with it. Another ingress then adopts the stream and goes on from the last row, so the same numbers are given
again, to other events. Hence the rule of :func:`rewind_for`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serve_app.domain.continuation import Continuation
from serve_app.domain.events import (
    Ended,
    Event,
    Failed,
    ImagesProcessed,
    Loading,
    Numbered,
    Queued,
    Rewind,
    SessionOpened,
    Switched,
    Terminated,
    Token,
)
from serve_app.domain.generation import FinishReason, Timing, Usage

TOKEN = "token"


@dataclass(frozen=True, slots=True)
class Origin:
    """Who made an event: the model, on which attempt at the reply, and for text the ids of its tokens.

    ``revision``: of the model, where its ids can be continued (``Accepted.revision``).
    """

    model: str = ""
    provider: str = ""
    attempt: int = 0
    revision: str | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def maker(self) -> tuple[str, str, int, str | None]:
        return self.model, self.provider, self.attempt, self.revision

    def goes_on(self, earlier: Origin) -> bool:
        """Whether the ids of both, joined, are what one model made: it was continued by ids."""
        if self.revision and (self.model, self.provider, self.revision) == (
            earlier.model,
            earlier.provider,
            earlier.revision,
        ):
            return True
        return self.maker == earlier.maker


@dataclass(frozen=True, slots=True)
class LogRow:
    """Consecutive events of one stream: one event of any kind, or any number that carry text.

    ``seq`` to ``seq_to``: their numbers. ``offset``: code points of the reply before ``text``. ``lengths``: how
    ``text`` is cut into events. ``payload``: the fields of an event that carries no text, as JSON values. ``epoch``
    counts the owners of the session, from 1.
    """

    seq: int
    seq_to: int
    offset: int
    kind: str
    text: str = ""
    lengths: tuple[int, ...] = ()
    payload: Mapping[str, Any] | None = None
    origin: Origin = Origin()
    epoch: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """An event with its number and its origin, on its way into the log."""

    numbered: Numbered
    origin: Origin


def rows_of(entries: Sequence[Entry], offset: int, epoch: int) -> list[LogRow]:
    """The rows that hold ``entries``, which are consecutive; ``offset``: code points of the reply before the first."""
    rows: list[LogRow] = []
    run: list[Entry] = []
    for entry in entries:
        textual = isinstance(entry.numbered.event, Token)
        if run and not (textual and entry.origin.maker == run[0].origin.maker):
            rows.append(_text_row(run, epoch))
            run = []
        if textual:
            run.append(entry)
            offset = _end(entry)
        else:
            rows.append(_other_row(entry, offset, epoch))
    if run:
        rows.append(_text_row(run, epoch))
    return rows


def _end(entry: Entry) -> int:
    token = entry.numbered.event
    assert isinstance(token, Token)
    return token.offset + len(token.text)


def _text_row(run: Sequence[Entry], epoch: int) -> LogRow:
    tokens = [entry.numbered.event for entry in run if isinstance(entry.numbered.event, Token)]
    first, last = run[0], run[-1]
    ids = tuple(token for entry in run for token in entry.origin.token_ids)
    return LogRow(
        first.numbered.seq,
        last.numbered.seq,
        tokens[0].offset,
        TOKEN,
        "".join(token.text for token in tokens),
        tuple(len(token.text) for token in tokens),
        origin=Origin(*first.origin.maker, ids),
        epoch=epoch,
    )


def _other_row(entry: Entry, offset: int, epoch: int) -> LogRow:
    event, seq = entry.numbered.event, entry.numbered.seq
    payload = asdict(event)
    if isinstance(event, Terminated):
        del payload["partial_response"]  # the rows before hold it
    return LogRow(seq, seq, offset, event.name or TOKEN, payload=payload, origin=entry.origin, epoch=epoch)


def _ended(values: dict[str, Any]) -> Ended:
    return Ended(
        values["message_id"],
        Usage(**values["usage"]),
        Timing(**values["timing"]),
        FinishReason(values["finish_reason"]),
    )


def _images(values: dict[str, Any]) -> ImagesProcessed:
    return ImagesProcessed(tuple(values["images"]), tuple(values["warnings"]))


_READERS: Mapping[str, Any] = {
    "session": lambda values: SessionOpened(**values),
    "images": _images,
    "queued": lambda values: Queued(**values),
    "loading": lambda values: Loading(**{**values, "evicting": tuple(values["evicting"])}),
    "switched": lambda values: Switched(**values),
    "end": _ended,
    "error": lambda values: Failed(**values),
}


@dataclass
class Transcript:
    """A stream as its rows tell it: the events, and what an ingress needs to go on with it.

    ``starts``: the number of the last event and the length of the text when the stream was adopted, each time.
    ``token_ids``: those of the last model's own part of the text, which begins at ``earlier``.
    """

    events: list[Numbered] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""
    earlier: int = 0
    token_ids: list[int] = field(default_factory=list)
    token_count: int = 0
    origin: Origin = field(default_factory=Origin)
    epoch: int = 1

    @property
    def seq(self) -> int:
        """The number of the last event."""
        return self.events[-1].seq if self.events else 0

    @property
    def finished(self) -> bool:
        return bool(self.events) and self.events[-1].event.terminal

    @property
    def continuation(self) -> Continuation | None:
        """What whoever goes on with the reply must know; None when nothing was said yet."""
        if not self.text:
            return None
        ids = tuple(self.token_ids) if self.origin.revision else ()
        return Continuation(self.text, ids, self.origin.revision, self.earlier, self.token_count)

    def add(self, rows: Iterable[LogRow]) -> list[Numbered]:
        """Take rows in, in their order; the events that they hold."""
        before = len(self.events)
        for row in rows:
            assert row.seq == self.seq + 1, f"a gap in the log: {row.seq} after {self.seq}"
            if row.epoch != self.epoch:
                self.adopted(row.epoch)
            if row.kind == TOKEN:
                self._add_text(row)
            else:
                self.events.append(Numbered(row.seq, self._read(row)))
        return self.events[before:]

    def adopted(self, epoch: int) -> None:
        """Remember that another owner goes on from here."""
        self.starts.append((self.seq, len(self.text)))
        self.epoch = epoch

    def _add_text(self, row: LogRow) -> None:
        if not row.origin.goes_on(self.origin):
            self.token_ids.clear()
            self.earlier = row.offset
        self.origin = row.origin
        self.token_ids += row.origin.token_ids
        self.token_count += len(row.origin.token_ids) or len(row.lengths)  # of a server that tells no ids
        at = 0
        for seq, length in enumerate(row.lengths, row.seq):
            self.events.append(Numbered(seq, Token(row.text[at : at + length], row.offset + at)))
            at += length
        self.text += row.text

    def _read(self, row: LogRow) -> Event:
        values = dict(row.payload or {})
        if row.kind == "terminated":
            return Terminated(partial_response=self.text, **values)
        event: Event = _READERS[row.kind](values)
        return event


def rewind_for(after: int, seq: int, length: int, starts: Sequence[tuple[int, int]]) -> Rewind | None:
    """Where a reader whose last event had the number ``after`` must go back to, or None when it can go on.

    ``seq`` and ``length``: the last event that there is, and the text up to it. Numbers after a stream's adoption were
    perhaps given twice, and nothing tells which of the two events the reader saw: it goes back to the adoption.
    """
    for start, offset in starts:
        if after > start:
            return Rewind(start, offset)
    return Rewind(seq, length) if after > seq else None
