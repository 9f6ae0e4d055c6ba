"""An OpenAI-compatible upstream that misbehaves as its prompt says: hang, drop, lie, garbage; else it answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


class BadUpstream:
    """Serves on loopback in a thread of its own, as a context manager; ``url`` is its base."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._over = asyncio.Event()
        self.url = ""

    def __enter__(self) -> BadUpstream:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _end(self) -> None:
        """Let those go that hang, and wait for them."""
        self._over.set()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in head.split("\r\n"))}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if head.startswith("GET"):
                await self._models(writer)
            else:
                await self._complete(writer, json.loads(body))
        writer.close()

    async def _models(self, writer: asyncio.StreamWriter) -> None:
        data = json.dumps({"object": "list", "data": [{"id": "bad", "object": "model"}]}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(data) + data)
        await writer.drain()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, object]) -> None:
        mode = json.dumps(body.get("messages") or body.get("prompt"))
        writer.write(HEAD)
        for n in range(3):
            await self._event(writer, {"choices": [{"index": 0, "delta": {"content": f" word{n}" if n else "word0"}}]})
        if "hang" in mode:
            await self._over.wait()
        if "drop" in mode:
            writer.transport.abort()
            return
        if "garbage" in mode:
            writer.write(b"data: {not json\n\n")
        if "lie" not in mode:
            await self._event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()

    @staticmethod
    async def _event(writer: asyncio.StreamWriter, value: object) -> None:
        writer.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        await writer.drain()
