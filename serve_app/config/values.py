"""How the values of settings and arguments are read: lists, sizes, addresses, keys.

Every function here is a validator: it takes what stands in the environment or in YAML and returns the value, or raises
``ValueError`` in words for the person who wrote it. None of these words repeats a secret.
"""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr

from serve_app.config.redaction import SecretUrl

MIN_KEY_LENGTH = 16
IMAGE_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)
_HOST = re.compile(r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$|^\[[0-9A-Fa-f:.]+\]$")
_DATABASES = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return [part for part in (part.strip() for part in value.split(",")) if part]
    return value


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = _SIZE.match(value)
    if not found:
        raise ValueError("this is not a size")
    unit = (found[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    power = " kmgt".index(unit[0]) if unit else 0
    return round(float(found[1]) * base**power)


def _http_url(value: SecretUrl) -> SecretUrl:
    url = value.get_secret_value()
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid = False
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid:
        raise ValueError("this is not an http:// or https:// address")
    return SecretUrl(url.rstrip("/"))


def _ollama_host(value: Any) -> Any:
    """Ollama's own notation: host, host:port or a URL; the port is 11434 when none is given."""
    text = value.get_secret_value() if isinstance(value, SecretUrl) else value
    if not isinstance(text, str) or not text:
        return value
    with_scheme = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(with_scheme)
        if parts.port is None and parts.scheme == "http" and parts.hostname and "://" not in text:
            with_scheme = f"{with_scheme.rstrip('/')}:11434"
    except ValueError:
        return with_scheme
    # 0.0.0.0 is what a server listens on, not where a client finds it.
    return with_scheme.replace("//0.0.0.0", "//127.0.0.1", 1)


def _database_url(value: SecretUrl) -> SecretUrl:
    scheme, separator, rest = value.get_secret_value().partition("://")
    driver = _DATABASES.get(scheme)
    if not separator or driver is None:
        raise ValueError("this database is not supported")
    if driver == "sqlite+aiosqlite":
        path = rest.partition("?")[0]
        if not path.startswith("/") or len(path) < 2 or ":memory:" in path:
            raise ValueError("SQLite needs a file, because several processes share it")
    elif not _database_name(f"postgresql://{rest}"):
        raise ValueError("the name of the database is missing")
    return SecretUrl(f"{driver}://{rest}")


def _database_name(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        # The library's words may hold a piece of the password.
        raise ValueError("this is not an address; special characters of a password are written as %xx") from None
    return parts.path.strip("/")


def _media_types(value: tuple[str, ...]) -> tuple[str, ...]:
    names = [name.lower().removeprefix("image/") for name in value]
    for name in names:
        if name.startswith("svg"):
            raise ValueError("SVG is refused, because it can carry scripts")
        if name not in IMAGE_TYPES:
            raise ValueError(f"{name!r} is not an image type that can be served")
    if not names:
        raise ValueError("the list is empty")
    return tuple(dict.fromkeys(IMAGE_TYPES[name] for name in names))


def _hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    for host in value:
        if host != "*" and not _HOST.match(host):
            raise ValueError(f"{host!r} is not a host name (no scheme, no port, no path)")
    if not value:
        raise ValueError("the list is empty, so every request would be refused")
    return tuple(host.lower() for host in value)


def _origins(value: tuple[str, ...]) -> tuple[str, ...]:
    for origin in value:
        if not re.match(r"^https?://[^/?#@\s]+$", origin):
            raise ValueError(f"{origin.rpartition('@')[2]!r} is not an origin such as https://app.example.com")
    return value


def _keys(value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    for position, key in enumerate(value, 1):
        text = key.get_secret_value()
        if len(text) < MIN_KEY_LENGTH:
            raise ValueError(f"key {position} has {len(text)} characters")
        if not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError(f"key {position} has a character that an HTTP header cannot carry")
    return value


def _variable(value: str) -> str:
    if not re.match(r"^[A-Z_][A-Z0-9_]*$", value):
        raise ValueError("this is not the name of an environment variable; never put the key itself here")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Hosts = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_hosts)]
Origins = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_origins)]
MediaTypes = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_media_types)]
Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(_split), AfterValidator(_keys)]
HttpUrl = Annotated[SecretUrl, AfterValidator(_http_url)]
OllamaHost = Annotated[SecretUrl, BeforeValidator(_ollama_host), AfterValidator(_http_url)]
DatabaseUrl = Annotated[SecretUrl, AfterValidator(_database_url)]
VariableName = Annotated[str, AfterValidator(_variable)]
Bytes = Annotated[int, BeforeValidator(_size, json_schema_input_type=int | str)]
