"""What a user of Ray Serve would write by hand for the same engine: one class, FastAPI, one message for each token.

``python -m benchmarks.peers.plain_serve --port 8100 --model scripted --engine scripted`` runs until Ctrl-C, with
Serve's default mode (Python proxy, no throughput options), as after `pip install "ray[serve]"`.
"""

import argparse
import asyncio
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

from serve_app.domain.generation import Delta, Finish, GenerationRequest, Message, Options
from serve_app.engines import registry
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect

api = FastAPI()


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(api)
class Completions:
    """``/v1/completions``, streamed."""

    def __init__(self, engine: str, model: str, path: str | None, options: dict[str, Any]) -> None:
        info = registry.describe(engine, model) if path is None else inspect(Path(path), model)
        assert info is not None
        extra = tuple(sorted(options.pop("extra", {}).items()))
        self._engine = registry.create(engine, info, EngineOptions(**options, extra=extra))

    @api.post("/v1/completions")
    async def complete(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._events(await request.json()), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        options = Options(temperature=body.get("temperature"), max_tokens=body.get("max_tokens"))
        messages = (Message.of("user", body["prompt"]),)
        asked = GenerationRequest(uuid.uuid4().hex, body["model"], messages, options, raw=True)
        head = {
            "id": asked.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body["model"],
        }
        async for item in self._engine.generate(asked):
            if isinstance(item, Delta):
                choice = {"index": 0, "text": item.text, "finish_reason": None}
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            elif isinstance(item, Finish):
                choice = {"index": 0, "text": "", "finish_reason": item.reason.value}
                usage = {
                    "prompt_tokens": item.usage.prompt_tokens,
                    "completion_tokens": item.usage.completion_tokens,
                }
                yield f"data: {json.dumps({**head, 'choices': [choice], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", default="scripted")
    parser.add_argument("--model", required=True)
    parser.add_argument("--path", help="folder of the model's files")
    parser.add_argument("--options", type=json.loads, default={}, help="of the engine, as JSON")
    given = parser.parse_args()
    ray.init(
        num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="warning", object_store_memory=2**28
    )
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    deployment: Any = Completions
    serve.run(deployment.bind(given.engine, given.model, given.path, given.options), blocking=False)
    print("plain Serve is ready", flush=True)  # noqa: T201
    try:
        asyncio.run(_until_signal())
    finally:
        serve.shutdown()
        ray.shutdown()


async def _until_signal() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


if __name__ == "__main__":
    main()
