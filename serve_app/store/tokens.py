"""Signed tokens that expire: proof of access to one conversation, or to one image.

A token is ``payload.signature``, both base64url without padding. The payload is JSON
``[version, purpose, subject, expiry in seconds since 1970]``; the signature is HMAC-SHA256 over the payload's text.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import math
from datetime import datetime

from serve_app.domain.errors import Forbidden, Unauthenticated

_VERSION = 1


def sign(key: bytes, purpose: str, subject: str, expires_at: datetime) -> str:
    """A URL-safe token that :func:`verify` accepts for ``purpose`` until ``expires_at``; it names ``subject``."""
    claims = [_VERSION, purpose, subject, math.ceil(expires_at.timestamp())]
    payload = _encode(json.dumps(claims, separators=(",", ":")).encode())
    return f"{payload}.{_signature(key, payload)}"


def verify(key: bytes, token: str, purpose: str, now: datetime) -> str:
    """The subject of a token. Unauthenticated without a token or after its expiry, Forbidden for a false one."""
    if not token:
        raise Unauthenticated("This needs an access token.")
    payload, _, signature = token.partition(".")
    expected = _signature(key, payload)
    # The text is compared, not its decoding: base64 spells the same bytes in several ways.
    if not hmac.compare_digest(signature.encode(errors="replace"), expected.encode()):
        raise _false_token()
    try:
        version, of_purpose, subject, expiry = json.loads(_decode(payload))
    except (binascii.Error, ValueError, TypeError) as error:
        raise _false_token() from error
    if version != _VERSION or of_purpose != purpose:
        raise _false_token()
    if now.timestamp() >= expiry:
        raise Unauthenticated("The access token has expired. Prove access again for a new one.")
    return str(subject)


def _signature(key: bytes, payload: str) -> str:
    return _encode(hmac.digest(key, payload.encode(errors="replace"), "sha256"))


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _false_token() -> Forbidden:
    return Forbidden("The access token is not valid here.")
