"""The client's reading of server-sent events."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.cli.sse import ServerEvent, read_events

BODY = (
    "\ufeff: hello\n\n"
    'id: 1\nevent: session\ndata: {"a": 1}\n\n'
    "id: 2\r\ndata: one\r\ndata: two\r\n\r\n"
    "data:no space\rdata:  two spaces\r\r"
    "event: lonely\n\n"
    "retry: 5\ndata: line\u2028separator\u0085\n\n"
    "data: cut off"
).encode()
EVENTS = [
    ServerEvent("session", '{"a": 1}', "1"),
    ServerEvent("", "one\ntwo", "2"),
    ServerEvent("", "no space\n two spaces", "2"),
    ServerEvent("", "line\u2028separator\u0085", "2"),
]


def test_events_are_read_as_the_standard_says() -> None:
    assert list(read_events([BODY])) == EVENTS


def test_events_may_arrive_byte_by_byte() -> None:
    assert list(read_events(BODY[at : at + 1] for at in range(len(BODY)))) == EVENTS


@given(st.lists(st.integers(0, len(BODY)), max_size=12))
def test_events_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), len(BODY)]
    assert list(read_events(BODY[low:high] for low, high in pairwise(borders))) == EVENTS


@pytest.mark.parametrize("end", ["\n\n", "\r\r", "\r\n\r\n"])
def test_the_last_event_counts_when_its_end_has_come(end: str) -> None:
    assert list(read_events([f"data: x{end}".encode()])) == [ServerEvent("", "x", "")]


def test_an_id_with_nul_is_ignored() -> None:
    assert list(read_events([b"id: 1\nid: a\0b\ndata: x\n\n"])) == [ServerEvent("", "x", "1")]
