"""What must hold after any fault, judged from the outside: what clients were told against what the store keeps.

It shares no code with the product: events are read off the wire, rows straight out of SQLite.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TERMINAL = ("end", "terminated", "error")
STATUS_OF = {"end": "COMPLETED", "terminated": "TERMINATED", "error": "ERROR"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One event as a client received it; ``name`` is None for text."""

    seq: int | None
    name: str | None
    data: dict[str, Any]


@dataclass(slots=True)
class Told:
    """All that one client knows of its request, over all its connections.

    ``marker`` is its message, unlike any other's. ``gave_up``: it left on purpose, and needs no terminal event.
    ``refused``: the code of the last answer that was no stream.
    """

    marker: str
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    gave_up: bool = False
    refused: str | None = None

    def first(self, name: str) -> dict[str, Any] | None:
        return next((one.data for one in self.seen if one.name == name), None)

    @property
    def acknowledged(self) -> bool:
        """Whether the server said that it has the message."""
        return self.first("session") is not None

    @property
    def terminals(self) -> list[Seen]:
        """The terminal events, each once however often it was replayed."""
        found: list[Seen] = []
        for one in self.seen:
            if one.name in TERMINAL and one not in found:
                found.append(one)
        return found


@dataclass(frozen=True, slots=True)
class Kept:
    """The store's rows: messages as (conversation, id, sender, text, status), sessions as (id, conversation, status,
    message id)."""

    messages: tuple[tuple[str, str, str, str, str], ...]
    sessions: tuple[tuple[str, str, str, str | None], ...]

    @classmethod
    def read(cls, path: Path) -> Kept:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30) as rows:
            messages = rows.execute(
                "SELECT conversation_id, id, sender, text, status FROM messages ORDER BY seq"
            ).fetchall()
            sessions = rows.execute("SELECT id, conversation_id, status, message_id FROM stream_sessions").fetchall()
        return cls(tuple(messages), tuple(sessions))


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that did not hold, for whom, and how."""

    rule: str
    marker: str
    detail: str


def check(told: Iterable[Told], kept: Kept) -> list[Violation]:
    """Every rule for every client, then the rules over the store alone. To be called when nothing runs any more."""
    found: list[Violation] = []
    for one in told:
        found += (Violation(rule, one.marker, detail) for rule, detail in _client(one, kept))
    found += (Violation(rule, "", detail) for rule, detail in _store(kept))
    return found


def scripted_text(tokens: int) -> str:
    """What the scripted engine says."""
    return " ".join(f"word{n}" for n in range(tokens))


def text_of(seen: Sequence[Seen]) -> tuple[str, list[str]]:
    """The reply that the events make, and what is wrong with how they follow each other."""
    text, wrong, last = "", [], 0
    by_seq: dict[int, Seen] = {}
    for one in seen:
        if one.name == "rewind":
            text, last = text[: int(one.data["offset"])], int(one.data["seq"])
            by_seq = {seq: event for seq, event in by_seq.items() if seq <= last}
            continue
        if one.seq is not None:
            if one.seq in by_seq:
                wrong.append(f"event {one.seq} came twice")
                continue
            if one.seq != last + 1:
                wrong.append(f"event {one.seq} followed event {last}")
            by_seq[one.seq], last = one, one.seq
        if one.name is None:
            if one.data["offset"] != len(text):
                wrong.append(f"text for offset {one.data['offset']} came at {len(text)}")
            text += one.data["token"]
    return text, wrong


def _client(told: Told, kept: Kept) -> Iterator[tuple[str, str]]:
    text, wrong = text_of(told.seen)
    yield from (("events in order, none twice", problem) for problem in wrong)
    if not scripted_text(len(text.split()) + 1).startswith(text):
        yield "the text is the model's", f"{text[-80:]!r} is none of its replies"
    mine = [row for row in kept.messages if row[2] == "user" and row[3] == told.marker]
    if len(mine) > 1:
        yield "one message for one request", f"the message is stored {len(mine)} times"
    if not told.acknowledged:
        return
    if not mine:
        yield "no acknowledged message is lost", "the store does not have it"
    terminals = told.terminals
    if len(terminals) > 1:
        yield "one terminal event", " and ".join(str(one.name) for one in terminals)
    if not terminals and not told.gave_up:
        yield "one terminal event", f"none came on {told.connections} connections"
    if terminals:
        yield from _ending(terminals[0], text, told, kept)


def _ending(terminal: Seen, text: str, told: Told, kept: Kept) -> Iterator[tuple[str, str]]:
    opened = told.first("session") or {}
    status = next((row[2] for row in kept.sessions if row[0] == opened.get("sessionId")), None)
    if status is None:
        yield "the store knows the session", f"{opened.get('sessionId')} is not there"
    elif status != STATUS_OF[str(terminal.name)]:
        yield "client and store agree on the end", f"the client was told {terminal.name}, the store says {status}"
    if terminal.name != "end":
        return
    stored = next((row for row in kept.messages if row[1] == terminal.data.get("messageId")), None)
    if stored is None:
        yield "no acknowledged reply is lost", f"message {terminal.data.get('messageId')} is not stored"
    elif stored[3] != text:
        yield "client and store have the same reply", f"{len(text)} characters here, {len(stored[3])} there"


def _store(kept: Kept) -> Iterator[tuple[str, str]]:
    for id, _, status, _ in kept.sessions:
        if status == "ACTIVE":
            yield "every session ends", f"{id} is still active"
    for id, count in Counter(row[3] for row in kept.sessions if row[3]).items():
        if count > 1:
            yield "one session for one reply", f"message {id} belongs to {count} sessions"
    senders: dict[str, Counter[str]] = {}
    for conversation, _, sender, _, _ in kept.messages:
        senders.setdefault(conversation, Counter())[sender] += 1
    for conversation, counts in senders.items():
        if counts["llm"] > counts["user"]:
            yield "one reply for one message", f"{counts['llm']} replies to {counts['user']} messages in {conversation}"


def decoded(pieces: Iterable[Any]) -> list[Seen]:
    """Events of benchmarks.surfaces as the checker knows them; comments are left out."""
    found = []
    for piece in pieces:
        if piece.name != ":" and piece.data:
            found.append(Seen(int(piece.id) if piece.id else None, piece.name, json.loads(piece.data)))
    return found
