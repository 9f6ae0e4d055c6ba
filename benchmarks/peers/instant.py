"""An OpenAI-compatible upstream that answers at once: what a gateway before it adds is all that is left to measure.

``python -m benchmarks.peers.instant --port 8200``: raw asyncio, one model ``instant``, ``max_tokens`` chunks of one
token each in one write, then usage and ``[DONE]``. With ``--pace`` seconds between the chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json

MODELS = {"object": "list", "data": [{"id": "instant", "object": "model", "created": 0, "owned_by": "benchmark"}]}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Instant:
    """Serves connections, kept alive between requests."""

    def __init__(self, pace: float) -> None:
        self._pace = pace

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if lines[0].startswith("GET"):
                    await self._json(writer, MODELS)
                else:
                    await self._complete(writer, json.loads(body), chat="/chat/" in lines[0])
        writer.close()

    async def _json(self, writer: asyncio.StreamWriter, value: object) -> None:
        data = json.dumps(value).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
        )
        await writer.drain()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, object], chat: bool) -> None:
        count = int(str(body.get("max_tokens") or body.get("max_completion_tokens") or 16))
        kind = "chat.completion.chunk" if chat else "text_completion"
        base = {"id": "x", "object": kind, "created": 0, "model": "instant"}
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        if not body.get("stream"):
            text = " ".join(f"word{n}" for n in range(count))
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices = [{"index": 0, **said, "finish_reason": "stop"}]
            return await self._json(
                writer, {**base, "object": kind.removesuffix(".chunk"), "choices": choices, "usage": usage}
            )
        writer.write(HEAD)
        for n in range(count):
            text = f" word{n}" if n else "word0"
            said = {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
            await self._chunk(writer, {**base, "choices": [{"index": 0, **said, "finish_reason": None}]})
            if self._pace:
                await asyncio.sleep(self._pace)
        last: dict[str, object] = {"delta": {}} if chat else {"text": ""}
        await self._chunk(writer, {**base, "choices": [{"index": 0, **last, "finish_reason": "stop"}]})
        await self._chunk(writer, {**base, "choices": [], "usage": usage})
        await self._event(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _chunk(self, writer: asyncio.StreamWriter, value: object) -> None:
        await self._event(writer, b"data: " + json.dumps(value).encode() + b"\n\n")

    async def _event(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        if self._pace:
            await writer.drain()


async def run(port: int, pace: float) -> None:
    server = await asyncio.start_server(Instant(pace).serve, "127.0.0.1", port)
    print("the instant upstream is ready", flush=True)  # noqa: T201
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pace", type=float, default=0.0)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(given.port, given.pace))


if __name__ == "__main__":
    main()
