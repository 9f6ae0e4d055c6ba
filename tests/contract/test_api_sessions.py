"""Ends of replies that no surface can bring about at will: before the first event, and before the generation."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.domain.conversation import SessionStatus, TerminationReason
from serve_app.domain.errors import ConversationBusy
from serve_app.domain.events import SessionOpened, Terminated
from serve_app.replies import LiveReply, NewReply
from tests.doubles import LocalPlatform

SLOW = "[[tokens=100000 pace=0.005]]"


async def start(platform: LocalPlatform, text: str) -> LiveReply:
    conversation = await platform.services.store.create_conversation("c", "A conversation")
    return await platform.services.sessions.start(NewReply(conversation, text))


async def test_a_reply_stopped_before_its_generation_began_ends_at_once(platform: LocalPlatform) -> None:
    reply = await start(platform, f"hello {SLOW}")
    reply.stop(TerminationReason.USER_REQUESTED)
    async with asyncio.timeout(5):
        await reply.done.wait()
    session = await platform.services.store.get_session(reply.session.id)
    assert (session.status, session.termination_reason) == (SessionStatus.TERMINATED, "USER_REQUESTED")
    assert platform.engine.counters().completion_tokens == 0


async def test_a_stream_begins_with_its_session_even_when_it_is_stopped_first(platform: LocalPlatform) -> None:
    platform.backend.loading["test/chat"] = asyncio.Event()
    reply = await start(platform, "hello")
    while not platform.backend.requests:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0)
    assert not reply.stream.events
    reply.stop(TerminationReason.SERVER_SHUTDOWN)
    seen = [numbered.event async for numbered in reply.stream.follow()]
    assert [type(event) for event in seen] == [SessionOpened, Terminated]


async def test_a_request_that_cannot_begin_leaves_the_routers_queue(platform: LocalPlatform) -> None:
    first = await start(platform, f"hello {SLOW}")
    platform.router.hold("test/chat")
    with pytest.raises(ConversationBusy):
        await platform.services.sessions.start(NewReply(first.conversation, "me too"))
    assert platform.router.cancelled == [platform.router.asked[-1].ticket]
