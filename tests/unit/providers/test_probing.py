"""Finding out whether an OpenAI-compatible server goes on with a begun reply."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import CapabilityMissing, ProviderError, RotundaError
from serve_app.domain.generation import Delta, GenerationRequest, Message, Options
from serve_app.providers.openai import OpenAI
from serve_app.providers.probing import goes_on, telling_place
from serve_app.providers.wire import Times, Wire
from tests.doubles import serving
from tests.unit.providers.test_openai import DONE, chunk

COUNT = "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve,"


@dataclass
class Server:
    """Counts to twelve, and goes on with begun replies when asked in ``way`` (a name of :data:`ASKED`)."""

    way: str = "never"
    status: int = 200
    strict: bool = False
    reply: str = COUNT
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def post(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return JSONResponse({"error": {"message": "broken"}}, self.status)
        if self.strict and "continue_final_message" in body:
            return JSONResponse({"error": {"message": "Unknown field: continue_final_message"}}, 400)
        last = body["messages"][-1]
        begun = last["content"] if last["role"] == "assistant" and ASKED[self.way](body) else ""
        text = self.reply.removeprefix(begun)
        most = body.get("max_tokens", 1000)
        pieces = [*(chunk(f" {word}" if n or begun else word) for n, word in enumerate(text.split()[:most]))]
        return Response(b"".join([*pieces, chunk(reason="stop"), DONE]), media_type="text/event-stream")

    @asynccontextmanager
    async def running(self, **settings: Any) -> AsyncIterator[OpenAI]:
        routes = [Route("/v1/chat/completions", self.post, methods=["POST"])]
        async with serving(Starlette(routes=routes)) as url:  # type: ignore[arg-type]
            provider = OpenAI(Wire("lab", f"{url}/v1", times=Times(1, 2, 1)), **settings)
            yield provider
            await provider.close()


ASKED: dict[str, Any] = {
    "never": lambda body: False,
    "fields": lambda body: body.get("continue_final_message") is True and body.get("add_generation_prompt") is False,
    "by itself": lambda body: True,
    "marked": lambda body: body["messages"][-1].get("prefix") is True,
}


def ask(**settings: Any) -> GenerationRequest:
    return GenerationRequest("r", "m", (Message.of("user", "Count."),), **settings)


async def text_of(provider: OpenAI, request: GenerationRequest) -> str:
    return "".join([item.text async for item in provider.generate(request) if isinstance(item, Delta)])


BEGUN = Continuation("one, two, three,", spent=3)


@pytest.mark.parametrize(
    ("way", "strict"), [("fields", False), ("by itself", False), ("by itself", True), ("marked", True)]
)
async def test_each_way_of_going_on_is_found_once(way: str, strict: bool) -> None:
    server = Server(way, strict=strict)
    async with server.running() as provider:
        for _ in range(2):
            rest = await text_of(provider, ask(continuation=BEGUN, options=Options(max_tokens=5)))
            assert rest == " four, five,"
        asked = len(server.bodies)
        assert (await text_of(provider, ask(continuation=BEGUN))).startswith(" four,")
        assert len(server.bodies) == asked + 1, "it was tried already"
    last = server.bodies[-1]["messages"][-1]
    assert (last["role"], last["content"]) == ("assistant", "one, two, three,")


async def test_a_server_that_begins_anew_is_found_out_and_not_asked_again_for_a_while() -> None:
    server = Server("never")
    async with server.running() as provider:
        for _ in range(2):
            with pytest.raises(CapabilityMissing, match="does not go on"):
                await text_of(provider, ask(continuation=BEGUN))
        assert len(server.bodies) == 4  # the question, and three ways to go on
        assert await text_of(provider, ask()) == COUNT


async def test_an_answer_that_tells_nothing_counts_as_no() -> None:
    for reply in ("no", "la la la la la la la la la la la la", ""):
        server = Server("by itself", reply=reply)
        async with server.running() as provider:
            with pytest.raises(CapabilityMissing):
                await text_of(provider, ask(continuation=BEGUN))


async def test_a_server_that_fails_is_tried_again_the_next_time() -> None:
    server = Server("fields", status=500)
    async with server.running() as provider:
        with pytest.raises(ProviderError):
            await text_of(provider, ask(continuation=BEGUN))
        server.status = 200
        assert (await text_of(provider, ask(continuation=BEGUN))).startswith(" four,")


async def test_who_may_not_be_tried_is_not_asked() -> None:
    server = Server("fields")
    async with server.running(continues=False) as provider:
        with pytest.raises(RotundaError):
            await text_of(provider, ask(continuation=BEGUN))
    assert not server.bodies


def test_the_place_to_cut_tells_the_parts_apart() -> None:
    place = telling_place(COUNT)
    assert place is not None and COUNT[place] == " " and abs(place - len(COUNT) / 2) < 10
    assert telling_place("abcdefghijklmnopqrstuvwxyz") == 13
    assert telling_place("too short") is None and telling_place("a a a a a a a a a a a a") is None
    assert goes_on(" four, five, six", "four, five") and not goes_on(" four, five", "one, two, three")
