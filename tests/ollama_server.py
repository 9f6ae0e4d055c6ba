"""A stand-in for an Ollama server: its wire format over real HTTP on 127.0.0.1, with faults on demand.

It holds no model. It answers each chat with words that follow from the model's name and the last message, keeps models
"in memory" as Ollama does (``keep_alive``, room for some, the one that expires first leaves), and writes what Ollama
0.12 writes (https://github.com/ollama/ollama/blob/main/docs/api.md; JSON as Go's ``encoding/json`` escapes it). The
official client is run against it in tests/contract/test_provider_ollama.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

KEEP_ALIVE_S = 300.0


@dataclass(frozen=True)
class StandInModel:
    """A model that the server offers; ``reply`` None = an echo of the last message of the user.

    ``continues``: a last message of the assistant is gone on with, as Ollama does; without it the reply begins anew.
    """

    name: str
    size: int = 2_000_000_000
    capabilities: tuple[str, ...] = ("completion",)
    context_length: int = 8192
    reply: str | None = None
    pace_s: float = 0.0
    continues: bool = True

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with one call of ``/api/chat``; the first that fits is used up.

    ``kind``: status (answers ``status`` with ``text``) · slow (waits ``seconds`` before the first byte) · hang (says
    nothing more after ``after`` chunks) · error (an error line then) · drop (the connection is cut then) · end (the
    stream ends well then, without ``done``) · garbage (a line that is no JSON then) · raw (``text`` as it is then).
    """

    kind: str
    after: int = 1
    status: int = 503
    text: str = "something went wrong"
    seconds: float = 0.5
    model: str | None = None
    times: int = 1


class Dropped(Exception):
    """Makes uvicorn cut the connection in the middle of a body."""


def go_json(value: Any) -> str:
    """JSON as Go writes it: compact, raw Unicode, but with ``<>&`` and U+2028/2029 escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def stamp(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat().replace("+00:00", "Z")


def error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)


@dataclass
class OllamaServer:
    """The server; ``with OllamaServer() as server`` runs it in a thread, at ``server.url``."""

    models: tuple[StandInModel, ...] = (StandInModel("llama3:8b"),)
    room: int = 10
    faults: deque[Fault] = field(default_factory=deque)
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """Path, body and headers of every POST."""
    open: int = 0
    """Streams that are being written."""
    left: int = 0
    """Streams whose client went before their end."""
    loaded: dict[str, float] = field(default_factory=dict)
    """Models in memory, and when each leaves it by itself."""
    url: str = ""
    port: int = 0

    def __enter__(self) -> OllamaServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after :meth:`stop`, on the same port again."""
        config = uvicorn.Config(
            self.app(), "127.0.0.1", self.port, log_level="critical", lifespan="off", timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]  # they are pytest's
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the stand-in did not start"
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Cut every connection and free the port, as a server that is killed does."""
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(10)
        self.loaded.clear()

    def bodies(self, path: str = "/api/chat") -> list[dict[str, Any]]:
        return [body for called, body, _ in self.requests if called == path]

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._root),
                Route("/api/version", self._version),
                Route("/api/tags", self._tags),
                Route("/api/ps", self._ps),
                Route("/api/show", self._show, methods=["POST"]),
                Route("/api/chat", self._chat, methods=["POST"]),
                Route("/api/generate", self._chat, methods=["POST"]),
                Route("/api/embed", self._embed, methods=["POST"]),
            ]
        )

    async def _root(self, request: Request) -> Response:
        return PlainTextResponse("Ollama is running")

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.12.6"})

    async def _tags(self, request: Request) -> Response:
        return JSONResponse({"models": [self._tag(model) for model in self.models]})

    async def _ps(self, request: Request) -> Response:
        now = time.time()
        self.loaded = {name: expires for name, expires in self.loaded.items() if expires > now}
        known = {model.name: model for model in self.models}
        running = [
            {
                **self._tag(known[name]),
                "expires_at": stamp(expires),
                "size_vram": 0,
                "context_length": known[name].context_length,
            }
            for name, expires in self.loaded.items()
        ]
        return JSONResponse({"models": running})

    async def _show(self, request: Request) -> Response:
        body = await self._body(request)
        model = self._find(str(body.get("model")))
        if model is None:
            return error(404, f"model '{body.get('model')}' not found")
        facts = {
            "general.architecture": "llama",
            "general.parameter_count": 8_030_261_248,
            "llama.context_length": model.context_length,
        }
        details = self._tag(model)["details"]
        shown = {"details": details, "model_info": facts, "capabilities": list(model.capabilities), "template": ""}
        return JSONResponse({**shown, "modelfile": "", "modified_at": stamp(1_760_000_000)})

    async def _embed(self, request: Request) -> Response:
        body = await self._body(request)
        model = self._find(str(body.get("model")))
        if model is None:
            return error(404, f"model '{body.get('model')}' not found")
        given = body["input"]
        texts = [given] if isinstance(given, str) else given
        vectors = [[float(len(text)), 1.0] for text in texts]
        return JSONResponse({"model": model.name, "embeddings": vectors, "prompt_eval_count": len(texts)})

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        path = request.url.path
        model = self._find(str(body.get("model")))
        if model is None:
            return error(404, f"model '{body.get('model')}' not found")
        if "completion" not in model.capabilities:
            return error(400, f'"{model.name}" does not support chat')
        if body.get("tools") and "tools" not in model.capabilities:
            return error(400, f"{model.name} does not support tools")
        fault = self._take_fault(model.name)
        if fault is not None and fault.kind == "status":
            return error(fault.status, fault.text)
        if not body.get("messages") and not body.get("prompt"):
            return self._turn(model, body)
        if fault is not None and fault.kind == "slow":
            await asyncio.sleep(fault.seconds)
        self._load(model, body.get("keep_alive"))
        lines = self._lines(path, model, body, fault)
        if body.get("stream") is False:
            return Response(await _whole(lines), media_type="application/json; charset=utf-8")
        return StreamingResponse(lines, media_type="application/x-ndjson")

    def _turn(self, model: StandInModel, body: dict[str, Any]) -> Response:
        """Without a message the model is only loaded, or unloaded."""
        unload = body.get("keep_alive") in (0, "0", "0s")
        if unload:
            self.loaded.pop(model.name, None)
        else:
            self._load(model, body.get("keep_alive"))
        head = {"model": model.name, "created_at": stamp(time.time()), "message": {"role": "assistant", "content": ""}}
        return JSONResponse({**head, "done_reason": "unload" if unload else "load", "done": True})

    async def _lines(
        self, path: str, model: StandInModel, body: dict[str, Any], fault: Fault | None
    ) -> AsyncIterator[bytes]:
        started = time.monotonic_ns()
        words, reason = self._words(model, body)
        self.open += 1
        ended = False
        try:
            for number, word in enumerate(words):
                if fault is not None and number == fault.after:
                    async for line in _faulty(fault):
                        yield line
                    if fault.kind == "end":
                        ended = True
                        return
                yield self._line(path, model, word, {"done": False})
                await asyncio.sleep(model.pace_s)
            total = time.monotonic_ns() - started
            counts = {"prompt_eval_count": len(json.dumps(body).split()), "eval_count": len(words)}
            spent = {"total_duration": total, "load_duration": 0, "prompt_eval_duration": total // 4}
            last = {"done": True, "done_reason": reason, **counts, **spent, "eval_duration": total // 2}
            yield self._line(path, model, "", last)
            ended = True
        finally:
            self.open -= 1
            self.left += not ended

    def _words(self, model: StandInModel, body: dict[str, Any]) -> tuple[list[str], str]:
        """The reply, a word to a chunk, within ``num_predict`` and before a stop string; and why it ends."""
        messages = list(body.get("messages") or [{"role": "user", "content": body.get("prompt", "")}])
        begun = messages.pop()["content"] if messages[-1].get("role") == "assistant" else ""
        text = model.reply if model.reply is not None else f"echo: {messages[-1].get('content', '')}"
        images = sum(len(message.get("images") or ()) for message in messages)
        text += f" [{images} images]" if images else ""
        options = body.get("options") or {}
        for stop in options.get("stop") or ():
            text = text.partition(stop)[0]
        first, *rest = text.split(" ")
        words = [first, *(f" {word}" for word in rest)]
        if begun and model.continues:
            words = words[len(begun.split()) :]
        most = options.get("num_predict", -1)
        return (words[:most], "length") if 0 <= most < len(words) else (words, "stop")

    def _line(self, path: str, model: StandInModel, text: str, more: dict[str, Any]) -> bytes:
        said = {"response": text} if path == "/api/generate" else {"message": {"role": "assistant", "content": text}}
        return (go_json({"model": model.name, "created_at": stamp(time.time()), **said, **more}) + "\n").encode()

    def _load(self, model: StandInModel, keep_alive: Any) -> None:
        seconds = float(keep_alive) if isinstance(keep_alive, int | float) else KEEP_ALIVE_S
        self.loaded[model.name] = time.time() + (seconds if seconds >= 0 else 1e9)
        while len(self.loaded) > self.room:
            self.loaded.pop(min(self.loaded, key=lambda name: self.loaded[name]))

    def _find(self, name: str) -> StandInModel | None:
        wanted = name if ":" in name else f"{name}:latest"
        return next((model for model in self.models if model.name == wanted), None)

    def _tag(self, model: StandInModel) -> dict[str, Any]:
        details = {"format": "gguf", "family": "llama", "parameter_size": "8.0B", "quantization_level": "Q4_K_M"}
        about = {"name": model.name, "model": model.name, "size": model.size, "digest": model.digest}
        return {**about, "modified_at": stamp(1_760_000_000), "details": {"parent_model": "", **details}}

    def _take_fault(self, model: str) -> Fault | None:
        for fault in self.faults:
            if fault.model in (None, model):
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    async def _body(self, request: Request) -> dict[str, Any]:
        body = dict(await request.json())
        self.requests.append((request.url.path, body, dict(request.headers)))
        return body


async def _faulty(fault: Fault) -> AsyncIterator[bytes]:
    match fault.kind:
        case "hang":
            await asyncio.Event().wait()
        case "error":
            yield (go_json({"error": fault.text}) + "\n").encode()
        case "drop":
            raise Dropped
        case "garbage":
            yield b'{"model": "llama3:8b", "mess\n'
        case "raw":
            yield fault.text.encode()


async def _whole(lines: AsyncIterator[bytes]) -> bytes:
    """The chunks of a stream as the one object that ``stream: false`` gives."""
    chunks = [json.loads(line) async for line in lines]
    whole = chunks[-1]
    if "message" in whole:
        whole["message"]["content"] = "".join(chunk["message"]["content"] for chunk in chunks)
    else:
        whole["response"] = "".join(chunk["response"] for chunk in chunks)
    return go_json(whole).encode()


@contextlib.contextmanager
def nothing_listens() -> Iterator[str]:
    """The URL of a port on which nobody listens."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
