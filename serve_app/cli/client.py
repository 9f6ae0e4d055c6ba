"""The REST API of a running server, as the commands use it. Every failure is a :class:`RotundaError` in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from serve_app.cli.sse import ServerEvent, read_events
from serve_app.config import redact_url
from serve_app.domain.errors import (
    InvalidInput,
    ProviderError,
    ProviderUnavailable,
    RotundaError,
    Unauthenticated,
    error_from_dict,
)

# A stream sends at least a heartbeat each 15 s by default; much longer silence means that nobody is there.
_TIMEOUT = httpx.Timeout(30, connect=5)
_STREAM_TIMEOUT = httpx.Timeout(90, connect=5)


class ConnectionLost(ProviderUnavailable):
    """A stream broke off; it can be resumed."""


class Client:
    """A server at ``url``; close it, or use it as a context manager."""

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT, transport=transport)
            is_http = self._http.base_url.scheme in ("http", "https") and bool(self._http.base_url.host)
        except (httpx.InvalidURL, UnicodeEncodeError):
            is_http = False
        if not is_http:
            raise InvalidInput(f"{redact_url(url)!r} is not the address of a server, such as http://127.0.0.1:8000.")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        return self._call("GET", path)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._call("POST", path, body or {})

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        return self._checked(response)

    @contextmanager
    def stream(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, after: str = ""
    ) -> Iterator[Iterator[ServerEvent]]:
        """The events of a stream, after the one with the id ``after``; raises ConnectionLost when it breaks off."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after else {})}
        try:
            with self._http.stream(method, path, json=body, headers=headers, timeout=_STREAM_TIMEOUT) as response:
                if response.is_error or "text/event-stream" not in response.headers.get("content-type", ""):
                    response.read()
                    self._checked(response)
                    raise self._stranger(response)
                yield read_events(response.iter_bytes())
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except httpx.TransportError as error:
            raise ConnectionLost(f"The connection to {redact_url(self.url)} broke off.") from error

    def _unreachable(self, error: Exception) -> RotundaError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return ProviderUnavailable(f"{redact_url(self.url)} did not answer in time.")
        return ProviderUnavailable(
            f"No server can be reached at {redact_url(self.url)}. Start one with `make serve`, or name one with --url."
        )

    def _stranger(self, response: httpx.Response) -> RotundaError:
        return ProviderError(
            f"{redact_url(self.url)} answered {response.status_code}, but not as Rotunda does. Is --url right?"
        )

    def _checked(self, response: httpx.Response) -> Any:
        try:
            content = response.json()
        except ValueError:
            raise self._stranger(response) from None
        if not response.is_error:
            return content
        fault = content.get("error") if isinstance(content, dict) else None
        if not isinstance(fault, dict):
            raise self._stranger(response)
        error = error_from_dict(fault)
        if isinstance(error, Unauthenticated):
            error.message = f"{error.message} Give the key with --api-key or in ROTUNDA_API_KEY."
        raise error


def model_path(name: str, action: str = "") -> str:
    """The REST path of a model; ids hold slashes and colons."""
    return f"/api/models/{quote(name, safe='/:')}" + (f"/{action}" if action else "")
