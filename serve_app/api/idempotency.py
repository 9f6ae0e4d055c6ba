"""What makes a request that is sent again the same request: its caller's key, and what it asks for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from serve_app.domain.conversation import StreamSession
from serve_app.domain.errors import InvalidInput

MAX_LENGTH = 255


def key_of(caller: str, given: str | None, param: str) -> str | None:
    """The name of a request among those of all callers; None when it was ``given`` no key.

    Raises:
        InvalidInput: the key, which came as ``param``, is empty or too long.
    """
    if given is None:
        return None
    if not 0 < len(given) <= MAX_LENGTH:
        raise InvalidInput(f"{param} must have 1 to {MAX_LENGTH} characters.", details={"param": param})
    # Not the key itself: keys of one caller must not be guessed by another, nor read in the store.
    return hashlib.sha256(f"{caller}\n{given}".encode()).hexdigest()


def fingerprint(content: Any) -> str:
    """Tells whether two requests ask for the same; ``content`` is of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def the_same(known: StreamSession, fingerprint: str, param: str) -> StreamSession:
    """``known``, the reply that was begun with the key. Raises InvalidInput when it answers another message."""
    if known.fingerprint != fingerprint:
        raise InvalidInput(
            f"Another message was sent with this {param} before. A new message needs a new key.",
            details={"param": param},
        )
    return known
