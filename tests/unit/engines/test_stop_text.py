"""Text from tokens: the same however it is cut, whole characters only, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from serve_app.domain.generation import Delta
from serve_app.engines.text import Detokenizer, StopFilter, TextStream, guarded_step, window_step

ALPHABET = "abé🙂\n"
texts = st.text(ALPHABET, max_size=40)
stops = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def expected(text: str, wanted: Sequence[str]) -> tuple[str, str | None]:
    """By definition: the match that ends first, of those that end together the longest."""
    ends = [(end, -len(stop), stop) for stop in wanted for end in range(len(text) + 1) if text[:end].endswith(stop)]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


class Bytes:
    """A tokenizer whose tokens are any runs of bytes; some ids are special and have no text."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[token] for token in ids).decode("utf-8", "replace")


def run(tokens: Sequence[bytes], wanted: Sequence[str]) -> tuple[list[Delta], str | None]:
    tokenizer = Bytes(tokens)
    stream = TextStream(Detokenizer(window_step(tokenizer.decode), tokenizer.decode), wanted)
    deltas: list[Delta | None] = []
    for token in range(len(tokens)):
        deltas.append(stream.push(token))
        if stream.matched is not None:
            break
    deltas.append(stream.finish())
    return [delta for delta in deltas if delta is not None], stream.matched


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A text, and its bytes cut into tokens at any places (within characters too), empty tokens among them."""
    text = draw(texts)
    raw = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    return text, [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


@given(cut_texts(), stops)
def test_any_cut_gives_the_text_before_the_first_stop_string(cut: tuple[str, list[bytes]], wanted: list[str]) -> None:
    text, tokens = cut
    deltas, matched = run(tokens, wanted)
    assert ("".join(delta.text for delta in deltas), matched) == expected(text, wanted)


@given(cut_texts(), stops)
def test_what_is_given_away_is_never_taken_back(cut: tuple[str, list[bytes]], wanted: list[str]) -> None:
    text, tokens = cut
    final, _ = expected(text, wanted)
    sent = ""
    for delta in run(tokens, wanted)[0]:
        sent += delta.text
        assert delta.text and final.startswith(sent)


@given(cut_texts(), stops)
def test_the_ids_given_away_spell_the_text_given_away(cut: tuple[str, list[bytes]], wanted: list[str]) -> None:
    _, tokens = cut
    decode = Bytes(tokens).decode
    deltas, matched = run(tokens, wanted)
    ids: list[int] = []
    for number, delta in enumerate(deltas):
        ids += delta.token_ids
        sent = "".join(before.text for before in deltas[: number + 1])
        last = number == len(deltas) - 1
        assert decode(ids) == sent or (last and matched is not None and decode(ids).startswith(sent))
    assert ids == sorted(set(ids))


@given(cut_texts())
def test_no_delta_splits_a_character(cut: tuple[str, list[bytes]]) -> None:
    assert all("\ufffd" not in delta.text for delta in run(cut[1], [])[0])


def test_an_incomplete_tail_is_shown_as_such_at_the_end() -> None:
    deltas, _ = run([b"ok", "é".encode()[:1]], [])
    assert [delta.text for delta in deltas] == ["ok", "\ufffd"]


@given(texts, stops)
def test_one_character_at_a_time_or_all_at_once(text: str, wanted: list[str]) -> None:
    whole, single = StopFilter(wanted), StopFilter(wanted)
    end = whole.push(text)
    ends = next((position for position, character in enumerate(text, 1) if single.push(character)), None)
    assert (end, whole.matched, whole.held) == (ends, single.matched, single.held)


def test_what_could_become_a_stop_string_is_held_and_let_go() -> None:
    tokens = [b"a", b"S", b"T", b"O", b"x", b"STOP", b"never"]
    deltas, matched = run(tokens, ["STOP"])
    assert [delta.text for delta in deltas] == ["a", "STOx"]
    assert [delta.token_ids for delta in deltas] == [(0,), (1, 2, 3, 4)]
    assert matched == "STOP"


def test_a_stop_string_inside_a_token_keeps_what_is_before_it() -> None:
    deltas, matched = run([b"one\n\nUser: two"], ["\nUser:"])
    assert [delta.text for delta in deltas] == ["one\n"]
    assert matched == "\nUser:"


def test_tokens_without_text_go_with_the_next() -> None:
    deltas, _ = run(["é".encode()[:1], "é".encode()[1:], b"", b"x"], [])
    assert [delta.token_ids for delta in deltas] == [(0, 1), (2, 3)]


@given(cut_texts(), st.integers(0, 12))
def test_a_step_that_fails_is_taken_over_without_a_seam(cut: tuple[str, list[bytes]], good: int) -> None:
    text, tokens = cut
    tokenizer = Bytes(tokens)
    inner = window_step(tokenizer.decode)

    def fails(token: int) -> str | None:
        if token >= good:
            raise RuntimeError("Invalid prefix")
        return inner(token)

    detokenizer = Detokenizer(guarded_step(fails, tokenizer.decode), tokenizer.decode)
    pieces = [detokenizer.push(token) for token in range(len(tokens))]
    assert "".join(pieces) + detokenizer.flush() == text


def test_sentencepiece_like_blanks_survive() -> None:
    words = ["▁The", "▁cat", "s", "▁sat"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    step = window_step(decode)
    assert [step(token) for token in range(4)] == ["The", " cat", "s", " sat"]
