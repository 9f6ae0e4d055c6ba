"""HTTP to a remote model server: requests out, bounded answers and typed errors back."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from serve_app.config import Settings
from serve_app.domain.errors import DeadlineExceeded, InvalidConfig, Phase, ProviderError, ProviderUnavailable
from serve_app.providers.refusals import code_of, refusal, words_of

logger = logging.getLogger(__name__)

MOST_ANSWER = 32 * 2**20
"""Bytes of a whole answer, for instance a list of models."""
MOST_LINE = 8 * 2**20
"""Bytes of one line or event of a stream."""
MOST_ERROR = 64 * 2**10
DRAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Times:
    """How long a server may take, in seconds: to connect, to begin an answer (it may load the model first), between
    two pieces of a stream, and for a whole answer that is not streamed."""

    connect_s: float = 5.0
    first_token_s: float = 120.0
    idle_s: float = 60.0
    answer_s: float = 10.0


def times_of(settings: Settings) -> Times:
    """What the settings allow; a server that is asked for a model which it must load first begins late."""
    return Times(
        connect_s=settings.connect_timeout_ms / 1000,
        first_token_s=settings.hf_load_timeout_ms / 1000,
        idle_s=settings.idle_timeout_ms / 1000,
    )


class Wire:
    """One server's HTTP.

    Args:
        provider: name of the provider, for errors.
        base_url: address that paths are appended to.
        key: sent as ``Authorization: Bearer``.
        times: limits of every wait.
    """

    def __init__(self, provider: str, base_url: str, key: str | None = None, times: Times | None = None) -> None:
        self.provider = provider
        self.times = times or Times()
        self._key = key
        # Compression would hide how long a line is, and helps nobody who streams tokens.
        headers = {"User-Agent": "rotunda", "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            urlsplit(base_url).port  # noqa: B018 - it raises
            self._client = httpx.AsyncClient(
                base_url=base_url,
                headers=headers,
                timeout=httpx.Timeout(None, connect=self.times.connect_s),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            )
        except (httpx.InvalidURL, ValueError):
            raise InvalidConfig(f"The address of {provider} is not valid.", provider) from None

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON value that a GET answers with."""
        return await self._answer("GET", path, None, None, self.times.answer_s, headers or {})

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        model: str | None,
        within_s: float | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON value that a POST answers with."""
        return await self._answer("POST", path, body, model, within_s or self.times.answer_s, trace or {})

    async def open(self, path: str, body: Mapping[str, Any], model: str, trace: Mapping[str, str]) -> Stream:
        """POST and return once the server begins to answer with success; close what you get."""
        with self.translated("first token", self.times.first_token_s):
            async with asyncio.timeout(self.times.first_token_s):
                response = await self._send("POST", path, body, trace)
                await self._check(response, model)
        return Stream(self, response)

    async def _answer(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        model: str | None,
        within_s: float,
        headers: Mapping[str, str],
    ) -> Any:
        with self.translated("first token", within_s):
            async with asyncio.timeout(within_s):
                response = await self._send(method, path, body, headers)
                try:
                    await self._check(response, model)
                    content = await _read(response, MOST_ANSWER)
                finally:
                    await response.aclose()
        return self.parsed(content)

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> httpx.Response:
        request = self._client.build_request(method, path, json=body, headers=dict(headers))
        return await self._client.send(request, stream=True)

    async def _check(self, response: httpx.Response, model: str | None) -> None:
        """Raise for an answer that is no success; the response is closed then."""
        if response.status_code == 200:
            return
        try:
            content = await _read(response, MOST_ERROR)
        finally:
            await response.aclose()
        wait = response.headers.get("retry-after", "")
        seconds = int(wait) if wait.isascii() and wait.isdigit() else None
        words = self._without_key(words_of(content))
        raise refusal(self.provider, response.status_code, words, model, seconds, code_of(content))

    def failure(self, words: str) -> Exception:
        """The error for a stream that reports one in its middle."""
        return refusal(self.provider, 500, self._without_key(words))

    def parsed(self, content: bytes | None) -> Any:
        """The JSON value in an answer; ``ProviderError`` when it is none."""
        try:
            return json.loads(content or b"")
        except (ValueError, RecursionError):
            raise self.nonsense("it is no JSON") from None

    def nonsense(self, why: str) -> ProviderError:
        """The error for an answer that does not follow the protocol."""
        return ProviderError(f"{self.provider} sent an answer that cannot be read: {why}.", self.provider, True)

    def broken_off(self) -> ProviderError:
        """The error for a stream that ends before it is complete."""
        return ProviderError(f"The answer of {self.provider} broke off before its end.", self.provider, True)

    def _without_key(self, words: str) -> str:
        return words.replace(self._key, "***") if self._key else words

    @contextmanager
    def translated(self, phase: Phase, seconds: float) -> Iterator[None]:
        """Turn the failures of the network into ours; what the library said goes to the log."""
        try:
            yield
        except TimeoutError:
            raise DeadlineExceeded.during(phase, seconds, self.provider) from None
        except httpx.ConnectTimeout:
            raise DeadlineExceeded.during("connect", self.times.connect_s, self.provider) from None
        except (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
            logger.warning("%s cannot be reached: %r", self.provider, error)
            raise ProviderUnavailable(
                f"{self.provider} cannot be reached. Is it running, and its address right?", self.provider
            ) from None
        except httpx.HTTPError as error:
            logger.warning("a call to %s broke off: %r", self.provider, error)
            raise self.broken_off() from None


class Stream:
    """The body of a successful answer, in the pieces in which it comes."""

    def __init__(self, wire: Wire, response: httpx.Response) -> None:
        self._wire = wire
        self._response = response
        self._chunks: AsyncIterator[bytes] = response.aiter_bytes()

    @property
    def content_type(self) -> str:
        return str(self._response.headers.get("content-type", "")).partition(";")[0].strip().lower()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield bytes; raises when the server is silent for too long, or the connection breaks off."""
        limit = self._wire.times.idle_s
        while True:
            with self._wire.translated("idle", limit):
                try:
                    async with asyncio.timeout(limit):
                        chunk = await anext(self._chunks)
                except StopAsyncIteration:
                    return
            yield chunk

    async def lines(self, most: int = MOST_LINE) -> AsyncGenerator[bytes, None]:
        """Yield the lines, split on byte 0x0A alone: U+0085, U+2028 and U+2029 may stand raw inside JSON strings."""
        rest = bytearray()
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                searched = len(rest)
                rest += chunk
                if rest.find(b"\n", searched) >= 0:
                    *whole, last = rest.split(b"\n")
                    for line in whole:
                        self._check_length(line, most)
                        yield bytes(line)
                    rest = last
                self._check_length(rest, most)
        if rest:
            yield bytes(rest)

    async def drain(self) -> None:
        """Read the end that follows the last item, so that the connection can be used again."""
        with suppress(TimeoutError, StopAsyncIteration, httpx.HTTPError):
            async with asyncio.timeout(DRAIN_S):
                await anext(self._chunks)

    async def close(self) -> None:
        await self._response.aclose()

    def _check_length(self, line: bytes | bytearray, most: int) -> None:
        if len(line) > most:
            raise self._wire.nonsense(f"a line has more than {most} bytes")


async def _read(response: httpx.Response, most: int) -> bytes:
    """The body, cut off after ``most`` bytes."""
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > most:
            break
    return bytes(content[:most])
