"""The held-out split of ``tiny-chat``: fixed by a hash, so before any training run and without a list to keep."""

from __future__ import annotations

import functools
import hashlib

SPLIT_SALT = "rotunda/tiny-chat/1"
HELD_OUT_FIFTHS = 1

FORCED_HELD_OUT: dict[str, frozenset[str]] = {
    "add": frozenset({"17+25"}),
    "count": frozenset({"3-120"}),
    "name": frozenset({"zorana", "orla"}),
    "persona": frozenset({"orla, a lighthouse keeper"}),
    "word": frozenset({"capital", "peru"}),
}


@functools.lru_cache(maxsize=1 << 18)
def is_held_out(kind: str, key: str) -> bool:
    """Tell whether an item must never occur in a training stream.

    Args:
        kind: The family of the item: ``add``, ``count``, ``name``, ``word`` or ``persona``.
        key: The item itself, normalised by its family (see the functions below).
    """
    if key in FORCED_HELD_OUT.get(kind, frozenset()):
        return True
    digest = hashlib.sha256(f"{SPLIT_SALT}|{kind}|{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 5 < HELD_OUT_FIFTHS


def add_is_held_out(left: int, right: int) -> bool:
    """Tell whether a sum is held out. The order of the operands does not matter, so no sum leaks through its mirror."""
    low, high = sorted((left, right))
    return is_held_out("add", f"{low}+{high}")


def count_is_held_out(first: int, last: int) -> bool:
    """Tell whether counting from ``first`` to ``last`` is held out."""
    return is_held_out("count", f"{first}-{last}")


def name_is_held_out(name: str) -> bool:
    """Tell whether a name is held out, in whatever case it is written."""
    return is_held_out("name", name.casefold())


def word_is_held_out(word: str) -> bool:
    """Tell whether a content word is held out, in whatever case it is written."""
    return is_held_out("word", word.casefold())
