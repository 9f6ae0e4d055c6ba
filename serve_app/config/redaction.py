"""What must not be shown: which names and values are secrets, and how they look in reports."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Secret

MASK = "********"

_SECRET_WORDS = frozenset(
    {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials", "bearer"}
)
_SECRET_PAIRS = frozenset(
    {
        *((first, last) for first in ("api", "private", "access", "signing", "auth") for last in ("key", "keys")),
        *((first, "token") for first in ("api", "access", "auth", "refresh", "hf", "hub", "session", "bot")),
    }
)
_SECRET_NAMES = frozenset({"token", "apikey", "apikeys", "authorization"})
_POINTERS = frozenset({"env", "file", "path"})
_POINTER = re.compile(r"_?(env|file|path)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"^(Bearer\s+\S+|sk-\S{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|xox[abp]-\S+|AKIA[0-9A-Z]{16})$")
_URL_PASSWORD = re.compile(r"://[^/?#\s]*@")
_QUERY_SECRET = re.compile(r"([?&][^=&]*(?:passw|token|secret|key)[^=&]*=)[^&]*", re.IGNORECASE)


def looks_secret(name: str) -> bool:
    """Whether a key with this name holds a secret. ``api_key_env`` does not: it names where the secret stands.

    >>> looks_secret("api_key"), looks_secret("apiKeyEnv"), looks_secret("max_tokens"), looks_secret("eos_token")
    (True, False, False, False)
    """
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if not words or words[-1] in _POINTERS:
        return False
    pairs = set(itertools.pairwise(words))
    return "".join(words) in _SECRET_NAMES or bool(_SECRET_WORDS & set(words)) or bool(_SECRET_PAIRS & pairs)


def looks_like_secret_value(value: object) -> bool:
    """Whether a value has the form of a well-known key, or is a URL with credentials in it."""
    return isinstance(value, str) and bool(_SECRET_VALUE.match(value.strip()) or _URL_PASSWORD.search(value))


def redact_url(url: str) -> str:
    """The URL without the credentials before ``@`` and without secrets in its query.

    >>> redact_url("postgresql://rotunda:hunter2@db/rotunda?sslpassword=x")
    'postgresql://***@db/rotunda?sslpassword=***'
    """
    head, at, tail = url.rpartition("@")
    if at:
        scheme, separator, _ = head.partition("://")
        url = f"{scheme}{separator}***@{tail}" if separator else f"***@{tail}"
    return _QUERY_SECRET.sub(r"\1***", url)


def shown(name: str, value: object) -> str:
    """``value`` as a report may show it: masked when it is a secret, shortened when it is long."""
    # Who writes the key itself where its place belongs must not find it in the log.
    if looks_secret(_POINTER.sub("", name)) and value not in (None, ""):
        return MASK
    if isinstance(value, str):
        value = MASK if _SECRET_VALUE.match(value.strip()) else redact_url(value)
    elif isinstance(value, Mapping | list | tuple):
        return f"a {'mapping' if isinstance(value, Mapping) else 'list'}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def secrets_in(value: Any, path: str = "") -> list[str]:
    """Dotted paths of everything in a tree of JSON values that looks like a secret."""
    if isinstance(value, Mapping):
        return [
            found
            for key, below in value.items()
            for found in (
                [f"{path}{key}"]
                if looks_secret(str(key)) and below not in (None, "")
                else secrets_in(below, f"{path}{key}.")
            )
        ]
    if isinstance(value, list | tuple):
        return [found for index, below in enumerate(value) for found in secrets_in(below, f"{path}{index}.")]
    return [path.rstrip(".")] if looks_like_secret_value(value) else []


class SecretUrl(Secret[str]):
    """A URL that may hold credentials: ``repr`` and ``str`` leave them out, ``get_secret_value()`` has them."""

    def _display(self) -> str:
        return redact_url(self._secret_value)
