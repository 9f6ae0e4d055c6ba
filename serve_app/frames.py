"""The wire between a model replica and an ingress: one message for all their streams, riding on one of the calls.

A message between two processes costs far more than its bytes, so what all streams of one ingress have ready leaves a
replica as one *frame*. Every request keeps a call of its own (Serve balances, drains, scales and cancels by it), but
only one of them, the *leader*, carries frames; the others stay silent. When the leader ends, the next one is
promoted.

Frames of two leaders may overtake each other, and those of a cancelled leader may be lost. So every item of a stream
has a number. The sending side keeps what it sent lately: after a leader that was cut off it sends that again, and a
call that never led ends with it. The receiving side puts the items in order and drops what it has already. What is
missing in spite of that makes a broken stream, and is said as such.

Nothing waits for a timer. This module is what both ends know; :mod:`serve_app.outbox` is a replica's end,
:mod:`serve_app.inbox` an ingress's.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from serve_app.domain.generation import Delta, Finish, Item


@dataclass(frozen=True, slots=True)
class Broken:
    """The error that ended a stream, as ``RotundaError.to_dict`` gives it."""

    error: dict[str, object]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one stream had ready: its items with the number (from 0) of the first of them."""

    stream: str
    seq: int
    items: tuple[Item | Broken, ...]


Frame = tuple[Piece, ...]


def pack(frame: Frame) -> bytes:
    """The frame as bytes. A delta of text alone, nearly every item there is, becomes a bare pair: pickling a slotted
    dataclass costs some twenty times as much."""
    plain = [(piece.stream, piece.seq, [_bare(item) for item in piece.items]) for piece in frame]
    return pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes) -> Frame:
    """What :func:`pack` packed. Only for bytes from our own replicas: unpickling trusts them."""
    return tuple(
        Piece(stream, seq, tuple(Delta(*item) if type(item) is tuple else item for item in items))
        for stream, seq, items in pickle.loads(data)
    )


def _bare(item: Item | Broken) -> Any:
    if isinstance(item, Delta) and not (item.reasoning or item.tool_calls or item.logprobs):
        return (item.text, item.token_ids)
    return item


def is_last(item: Item | Broken) -> bool:
    return isinstance(item, Finish | Broken)


def merged(items: list[Item | Broken], most_tokens: int) -> list[Item | Broken]:
    """The items with neighbouring deltas joined while they hold at most ``most_tokens`` tokens together.

    A delta without ids comes from a server that tells none: it counts as one token, and would not when it was joined.
    """
    result: list[Item | Broken] = []
    for item in items:
        last = result[-1] if result else None
        if isinstance(item, Delta) and isinstance(last, Delta) and item.token_ids and last.token_ids:
            both = last + item
            if len(both.token_ids) <= most_tokens:
                result[-1] = both
                continue
        result.append(item)
    return result
