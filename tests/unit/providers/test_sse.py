"""Server-sent events, cut into chunks at every possible place."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.providers.sse import SseReader, TooLong

STREAM = (
    b"\xef\xbb\xbf: a comment\r\n\r\ndata: one\r\n\r\nevent: ping\ndata: two\ndata:  lines\n\nid: 5\rdata:three\r\r"
    b"retry: 1\n\ndata\n\ndata: \xe2\x80\xa8raw\n\ndata: [DONE]\n\ndata: cut"
)
EVENTS = [b"one", b"two\n lines", b"three", b"", b"\xe2\x80\xa8raw", b"[DONE]"]


def events(*chunks: bytes, most: int = 1000) -> list[bytes]:
    reader = SseReader(most)
    return [event for chunk in chunks for event in reader.feed(chunk)]


def test_events_are_read_as_the_standard_says() -> None:
    assert events(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_it_does_not_matter_how_the_bytes_are_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[start:end] for start, end in itertools.pairwise(places)]
    assert events(*chunks) == EVENTS


def test_byte_for_byte() -> None:
    assert events(*(bytes([byte]) for byte in STREAM)) == EVENTS


@pytest.mark.parametrize("chunks", [[b"data: " + b"x" * 2000], [b"data: " + b"x" * 400 + b"\n"] * 5, [b"x" * 400] * 5])
def test_an_event_without_an_end_is_bounded(chunks: list[bytes]) -> None:
    with pytest.raises(TooLong):
        events(*chunks)
