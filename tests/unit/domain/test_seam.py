"""Text that goes on, begins anew, or repeats itself: after the seam nothing stands twice and nothing is missing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from serve_app.domain.errors import ProviderError
from serve_app.domain.generation import Delta
from serve_app.domain.seam import LOOK_BACK, OVERLAP, RESTART, SHORTEST, Seam

WORDS = st.lists(st.sampled_from(["the ", "fox", " ", "\n", "a", "b", "word ", "é", "1. ", "-"]), max_size=60)
TEXT = st.one_of(WORDS.map("".join), st.text(max_size=300))
REPLY = (
    "There are several ways to look at this.\n\n1. Begin with the oldest entry, and read on until the names agree.\n"
    "2. Begin with the newest one.\n\nBoth lead to the same place, but the second is shorter by far."
)


def cut(data: st.DataObject, text: str) -> list[str]:
    """The text in pieces of any size."""
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def told(before: str, pieces: list[str]) -> tuple[str, list[int], Seam]:
    seam = Seam(before)
    deltas = [seam.feed(Delta(piece, (number,))) for number, piece in enumerate(pieces)]
    given = [delta for delta in [*deltas, seam.finish()] if delta is not None]
    return "".join(delta.text for delta in given), [token for delta in given for token in delta.token_ids], seam


def looks_like_a_repetition(before: str, out: str) -> bool:
    beginning = before.strip()[:RESTART]
    return out.lstrip().startswith(beginning) or any(
        before.rstrip().endswith(out[:length]) for length in range(OVERLAP, len(out) + 1)
    )


@settings(max_examples=60, deadline=None)
@given(before=TEXT, rest=TEXT, data=st.data())
@example(before="The quick ", rest="brown", data=None)
@example(before="word word word word word ", rest="word word word word", data=None)
def test_of_a_model_that_goes_on_nothing_is_lost(before: str, rest: str, data: st.DataObject | None) -> None:
    blanks = before[len(before.rstrip()) :]
    if data is not None:
        assume(not looks_like_a_repetition(before, blanks + rest))
    text, ids, seam = told(before, cut(data, blanks + rest) if data else [blanks + rest])
    assert text == rest
    assert ids == sorted(ids) and (not rest or ids)
    assert seam.dropped <= len(ids)


@settings(max_examples=60, deadline=None)
@given(before=TEXT, rest=TEXT, data=st.data())
def test_every_id_is_told_even_when_its_text_is_not(before: str, rest: str, data: st.DataObject) -> None:
    pieces = cut(data, rest)
    try:
        _, ids, _ = told(before, pieces)
    except ProviderError:
        return
    assert ids == list(range(len(pieces)))


@settings(max_examples=60, deadline=None)
@given(place=st.integers(SHORTEST, len(REPLY)), data=st.data())
def test_of_a_model_that_begins_anew_the_repetition_is_dropped(place: int, data: st.DataObject) -> None:
    before = REPLY[:place]
    assume(len(before.strip()) >= SHORTEST)
    text, _, seam = told(before, cut(data, REPLY))
    assert text == REPLY[place:]
    assert seam.dropped <= 13


@settings(max_examples=60, deadline=None)
@given(place=st.integers(RESTART + 1, len(REPLY) - 30), data=st.data())
def test_a_model_that_begins_another_answer_is_rejected(place: int, data: st.DataObject) -> None:
    other = REPLY[: place - 1] + "§" + REPLY[place:]
    with pytest.raises(ProviderError, match="anew"):
        told(REPLY[: place + 20], cut(data, other))


def test_a_second_answer_that_ends_within_the_first_is_rejected() -> None:
    with pytest.raises(ProviderError, match="anew"):
        told(REPLY[:100], [REPLY[:50]])


@settings(max_examples=60, deadline=None)
@given(place=st.integers(60, len(REPLY) - 1), length=st.integers(OVERLAP + 1, 50), data=st.data())
def test_of_a_model_that_repeats_the_last_words_they_are_dropped(place: int, length: int, data: st.DataObject) -> None:
    before = REPLY[:place].rstrip()
    text, _, _ = told(before, cut(data, before[-length:] + REPLY[len(before) :]))
    assert before + text == REPLY


@pytest.mark.parametrize(
    ("before", "rest"),
    [
        ("word " * 20, "word " * 20),
        ("1. one\n1. one\n1. one\n1. one\n", "1. one\n1. one\n"),
        ("ha", "ha"),
        ("hahahahahahahahahahahahahahahahaha", "hahahahahahahahahahahahahahahahahaha"),
        ("--", "--"),
        ("", "Hello"),
        ("   ", "Hello"),
    ],
)
def test_what_repeats_itself_by_nature_is_left_as_it_is(before: str, rest: str) -> None:
    blanks = before[len(before.rstrip()) :]
    assert told(before, [blanks + rest])[0] == rest
    assert told(before, list(blanks + rest))[0] == rest


def test_blanks_are_given_once_whichever_side_gives_them() -> None:
    assert told("one ", [" two"])[0] == "two"
    assert told("one ", ["two"])[0] == "two"
    assert told("one\n\n", ["\n", "\n", "two"])[0] == "two"
    assert told("one", [" ", "two"])[0] == " two"


def test_not_more_is_held_back_than_is_said() -> None:
    seam = Seam(REPLY)
    held = 0
    for character in REPLY[60:]:
        if seam.feed(Delta(character, (1,))) is not None:
            break
        held += 1
    assert held <= LOOK_BACK
    seam = Seam(REPLY)
    assert seam.feed(Delta(" Zebra", (1,))) == Delta(" Zebra", (1,))
    assert seam.feed(Delta("There are several", (2,))) == Delta("There are several", (2,)), "later on nothing is judged"


def test_reasoning_is_passed_on() -> None:
    seam = Seam("The answer is")
    assert seam.feed(Delta("", (1,), reasoning="Hm.")) == Delta("", (1,), reasoning="Hm.")
    assert seam.feed(Delta(" 42", (2,))) == Delta(" 42", (2,))
