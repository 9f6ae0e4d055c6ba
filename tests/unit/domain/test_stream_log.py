"""The log of a stream: what is written is read back, however it was cut, and who saw too much goes back."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

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
from serve_app.domain.generation import FinishReason, JsonFormat, Options, Priority, Timing, Usage
from serve_app.domain.stream_log import Entry, LogRow, Origin, Transcript, rewind_for, rows_of
from serve_app.domain.wanted import Wanted

HERE = Origin("m", "p", 1, "r")
OTHERS: list[Event] = [
    SessionOpened("s", "c", "m", "p", "t", None),
    ImagesProcessed(({"id": "i", "url": "/x"},), ("too large",)),
    Queued(1, "memory is full", 20),
    Loading("m", ("n",), 0.5),
    Switched("m", "n", "it failed"),
]


def entries_of(events: list[Event], ids: bool = True) -> list[Entry]:
    return [
        Entry(Numbered(seq, event), Origin("m", "p", 1, "r", (seq,) if ids and isinstance(event, Token) else ()))
        for seq, event in enumerate(events, 1)
    ]


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """Events of a stream up to its end."""
    events: list[Event] = [OTHERS[0]]
    text = ""
    for piece in draw(st.lists(st.text(min_size=1, max_size=5) | st.sampled_from(range(1, len(OTHERS))), max_size=20)):
        if isinstance(piece, int):
            events.append(OTHERS[piece])
        else:
            events.append(Token(piece, len(text)))
            text += piece
    ends: list[Event] = [
        Ended("x", Usage(1, 2, 3), Timing(ttft_s=0.5), FinishReason.LENGTH),
        Terminated("s", text, 3, "USER_REQUESTED"),
        Failed("TIMEOUT", "Too slow.", None, True, "t", {"phase": "load"}),
    ]
    return [*events, draw(st.sampled_from(ends))]


@given(streams(), st.data())
def test_a_stream_written_in_batches_is_read_as_it_was(events: list[Event], data: st.DataObject) -> None:
    entries = entries_of(events)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(entries)), max_size=4)) | {0, len(entries)})
    told, offset = Transcript(), 0
    for start, stop in itertools.pairwise(cuts):
        rows = rows_of(entries[start:stop], offset, 1)
        told.add(replace(row, payload=json.loads(json.dumps(row.payload))) for row in rows)
        offset = len(told.text)
    assert [numbered.event for numbered in told.events] == events
    assert [numbered.seq for numbered in told.events] == list(range(1, len(events) + 1))
    assert told.finished
    assert told.token_ids == [numbered.seq for numbered in told.events if isinstance(numbered.event, Token)]


def test_text_of_one_attempt_is_one_row() -> None:
    rows = rows_of(entries_of([Token("a", 0), Token("bc", 1), OTHERS[2], Token("d", 3)]), 0, 1)
    assert [(row.seq, row.seq_to, row.offset, row.text, row.lengths) for row in rows] == [
        (1, 2, 0, "abc", (1, 2)),
        (3, 3, 3, "", ()),
        (4, 4, 3, "d", (1,)),
    ]


def test_ids_go_on_across_attempts_of_one_revision_and_start_anew_with_another_model() -> None:
    def row(seq: int, offset: int, text: str, *origin: object) -> LogRow:
        return LogRow(seq, seq, offset, "token", text, (len(text),), origin=Origin(*origin, (seq,)))  # type: ignore[arg-type]

    told = Transcript()
    told.add([row(1, 0, "ab", "m", "p", 1, "r"), row(2, 2, "cd", "m", "p", 2, "r")])
    goes_on = told.continuation
    assert goes_on is not None
    assert (goes_on.text, goes_on.token_ids, goes_on.revision, goes_on.earlier) == ("abcd", (1, 2), "r", 0)
    told.add([row(3, 4, "ef", "n", "p", 3, "s")])
    goes_on = told.continuation
    assert goes_on is not None
    assert (goes_on.text, goes_on.token_ids, goes_on.revision, goes_on.earlier) == ("abcdef", (3,), "s", 4)
    assert goes_on.spent == 3
    told.add([row(4, 6, "gh", "n", "q", 4, None), row(5, 8, "ij", "n", "q", 5, None)])
    goes_on = told.continuation
    assert goes_on is not None
    # Without a revision every attempt goes on by text.
    assert (goes_on.token_ids, goes_on.earlier, goes_on.spent) == ((), 8, 5)


def test_nothing_said_is_nothing_to_go_on_with() -> None:
    told = Transcript()
    told.add(rows_of(entries_of([OTHERS[0], OTHERS[2]]), 0, 1))
    assert told.continuation is None


def test_who_saw_what_was_lost_goes_back_to_the_adoption() -> None:
    starts = [(4, 10), (9, 30)]
    assert rewind_for(4, 12, 40, starts) is None
    assert rewind_for(5, 12, 40, starts) == Rewind(4, 10)
    assert rewind_for(12, 12, 40, starts) == Rewind(4, 10)
    assert rewind_for(12, 12, 40, []) is None
    assert rewind_for(13, 12, 40, []) == Rewind(12, 40)


def test_how_a_reply_is_wanted_survives_json() -> None:
    options = Options(0.5, 0.9, 3, 20, ("x", "y"), 7, stop_token_ids=(1, 2), logit_bias={3: -1.0})
    form = Options(response_format=JsonFormat({"type": "object"}))
    for one in (
        Wanted(),
        Wanted("m", "Be brief.", True, options, Priority.LOW, ("n",), "error", "cancel", "key-1", {"traceparent": "x"}),
        Wanted("m", options=form, draw_seed=2**62),
    ):
        assert Wanted.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Wanted().to_json() == {}
    assert HERE.goes_on(HERE)
