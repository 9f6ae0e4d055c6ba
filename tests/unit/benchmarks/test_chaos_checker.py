"""The checker of the fault tests finds each thing that it looks for, and nothing in what is sound."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import Kept, Seen, Told, Violation, check, scripted_text

TEXT = scripted_text(3)


def events(*, session: str = "s1", message: str = "m2", end: str = "end") -> list[Seen]:
    return [
        Seen(1, "session", {"sessionId": session, "conversationId": "c1"}),
        Seen(2, None, {"token": "word0 word1", "offset": 0}),
        Seen(3, None, {"token": " word2", "offset": 11}),
        Seen(4, end, {"messageId": message} if end == "end" else {"code": "X"}),
    ]


def told(seen: list[Seen] | None = None, **changed: Any) -> Told:
    return Told("ask 1", events() if seen is None else seen, connections=1, **changed)


def kept(**changed: Any) -> Kept:
    sound = Kept(
        messages=(("c1", "m1", "user", "ask 1", "complete"), ("c1", "m2", "llm", TEXT, "complete")),
        sessions=(("s1", "c1", "COMPLETED", "m2"),),
    )
    return replace(sound, **changed)


def rules(found: list[Violation]) -> set[str]:
    return {violation.rule for violation in found}


def test_a_sound_reply_breaks_no_rule() -> None:
    assert check([told()], kept()) == []


def test_a_reply_that_was_resumed_breaks_no_rule() -> None:
    first, rest = events()[:2], events()[2:]
    assert check([told(first + rest)], kept()) == []


def test_a_replayed_end_counts_once() -> None:
    seen = [*events()[:3], events()[3]]
    assert len(told([*seen, events()[3]]).terminals) == 1


def test_a_rewind_lets_the_text_come_again() -> None:
    rewound = [*events()[:3], Seen(None, "rewind", {"seq": 0, "offset": 0}), *events()]
    assert check([told(rewound)], kept()) == []


@pytest.mark.parametrize(
    ("seen", "rule"),
    [
        ([*events()[:2], events()[1], *events()[2:]], "events in order, none twice"),
        ([events()[0], *events()[2:]], "events in order, none twice"),
        (
            [events()[0], Seen(2, None, {"token": "word0 word1", "offset": 3}), *events()[2:]],
            "events in order, none twice",
        ),
        (
            [events()[0], Seen(2, None, {"token": "word0 word9", "offset": 0}), *events()[2:]],
            "the text is the model's",
        ),
        (events()[:3], "one terminal event"),
        ([*events(), Seen(5, "error", {"code": "X"})], "one terminal event"),
        (events(message="m9"), "no acknowledged reply is lost"),
        (events(session="s9"), "the store knows the session"),
        (events(end="error"), "client and store agree on the end"),
    ],
)
def test_what_a_client_was_told_wrongly_is_found(seen: list[Seen], rule: str) -> None:
    assert rule in rules(check([told(seen)], kept()))


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"messages": (("c1", "m2", "llm", TEXT, "complete"),)}, "no acknowledged message is lost"),
        (
            {"messages": (*kept().messages, ("c2", "m7", "user", "ask 1", "complete"))},
            "one message for one request",
        ),
        (
            {"messages": (kept().messages[0], ("c1", "m2", "llm", "word0", "complete"))},
            "client and store have the same reply",
        ),
        ({"messages": (*kept().messages, ("c1", "m3", "llm", TEXT, "complete"))}, "one reply for one message"),
        ({"sessions": (*kept().sessions, ("s2", "c1", "ACTIVE", None))}, "every session ends"),
        ({"sessions": (*kept().sessions, ("s2", "c1", "COMPLETED", "m2"))}, "one session for one reply"),
    ],
)
def test_what_the_store_lost_or_kept_twice_is_found(changed: dict[str, Any], rule: str) -> None:
    assert rule in rules(check([told()], kept(**changed)))


def test_a_client_that_left_needs_no_end_and_one_that_was_refused_needs_nothing() -> None:
    assert check([told(events()[:2], gave_up=True)], kept()) == []
    assert check([Told("ask 2", refused="QUEUE_FULL")], kept()) == []


def test_rows_are_read_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as rows:
        rows.execute("CREATE TABLE messages (conversation_id, id, sender, text, status, seq)")
        rows.execute("CREATE TABLE stream_sessions (id, conversation_id, status, message_id)")
        rows.execute("INSERT INTO messages VALUES ('c1', 'm1', 'user', 'ask 1', 'complete', 1)")
        rows.execute("INSERT INTO stream_sessions VALUES ('s1', 'c1', 'COMPLETED', 'm2')")
    found = Kept.read(path)
    assert found.messages == (("c1", "m1", "user", "ask 1", "complete"),)
    assert found.sessions == kept().sessions
