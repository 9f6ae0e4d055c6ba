"""Private conversations: every way to them is closed without a proof, and with a wrong one."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
from gql.transport.exceptions import TransportQueryError
from PIL import Image

from serve_app.domain.conversation import SessionStatus
from tests.contract.graphql_client import (
    ADD,
    MESSAGES,
    SEND,
    STREAM_MESSAGE,
    STREAM_SESSION,
    TERMINATE,
    Graph,
    subscribe,
    websocket,
)
from tests.doubles import LocalPlatform

PASSWORD = "correct horse"
VERIFY = "mutation($input: VerifyPasswordInput!) { verifyPassword(input: $input) { accessToken } }"
ARGUMENTS = {
    "conversation": """query($id: String!, $password: String, $token: String) {
      conversation(id: $id, password: $password, token: $token) { id messages { text } } }""",
    "messages": MESSAGES,
    "streamSession": """query($session: ID!, $password: String, $token: String) {
      streamSession(id: $session, password: $password, token: $token) { id partialResponse } }""",
    "deleteMessagesAfter": """mutation($cid: ID!, $message: ID!, $password: String, $token: String) {
      deleteMessagesAfter(conversationId: $cid, messageId: $message, password: $password, token: $token) {
        success } }""",
    "deleteConversation": """mutation($id: String!, $password: String, $token: String) {
      deleteConversation(conversationId: $id, password: $password, token: $token) { success } }""",
}


@pytest.fixture
async def graph(platform: LocalPlatform) -> AsyncIterator[Graph]:
    """A private conversation with one message, and a public one with a token of its own."""
    graph = Graph(platform)
    await graph.create(password=PASSWORD)
    await graph.add("Hello [[tokens=2]]", password=PASSWORD)
    yield graph


async def ids(platform: LocalPlatform) -> dict[str, str]:
    (session,) = await platform.services.store.list_sessions("c1")
    first, _ = await platform.services.store.list_messages("c1")
    return {"id": "c1", "cid": "c1", "session": session.id, "message": first.id}


async def wrong_proofs(graph: Graph) -> list[tuple[dict[str, str], str]]:
    """Proofs that must not open the conversation, with the code of the refusal."""
    await graph.create("other", password="another")
    verified = await graph.run(VERIFY, input={"conversationId": "other", "password": "another"})
    return [
        ({}, "UNAUTHENTICATED"),
        ({"password": "wrong"}, "FORBIDDEN"),
        ({"token": "not.a-token"}, "FORBIDDEN"),
        ({"token": verified["verifyPassword"]["accessToken"]}, "FORBIDDEN"),
    ]


def chosen(document: str, variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if f"${name}:" in document}


@pytest.mark.parametrize("operation", ARGUMENTS)
async def test_arguments_without_a_valid_proof_are_refused(graph: Graph, platform: LocalPlatform, operation: str):
    document = ARGUMENTS[operation]
    known = chosen(document, await ids(platform))
    for proof, code in await wrong_proofs(graph):
        assert await graph.refused(document, **known, **proof) == code
    assert len(await platform.services.store.list_messages("c1")) == 2


@pytest.mark.parametrize("operation", ARGUMENTS)
@pytest.mark.parametrize("way", ["password", "token", "header"])
async def test_each_proof_opens_the_way(graph: Graph, platform: LocalPlatform, operation: str, way: str):
    document = ARGUMENTS[operation]
    known = chosen(document, await ids(platform))
    verified = await graph.run(VERIFY, input={"conversationId": "c1", "password": PASSWORD})
    token = verified["verifyPassword"]["accessToken"]
    if way == "header":
        graph = Graph(platform, **{"X-Conversation-Token": token})
    proof = {"password": {"password": PASSWORD}, "token": {"token": token}, "header": {}}[way]
    assert await graph.run(document, **known, **proof)


@pytest.mark.parametrize("sender", ["user", "llm", "robot"])
async def test_add_message_is_refused(graph: Graph, platform: LocalPlatform, sender: str):
    for proof, code in await wrong_proofs(graph):
        wanted = {"conversationId": "c1", "text": "Hello", "sender": sender, **proof}
        assert await graph.refused(ADD, input=wanted) == code
    assert len(await platform.services.store.list_messages("c1")) == 2


async def test_send_message_is_refused_by_a_typed_failure(graph: Graph, platform: LocalPlatform):
    for proof, code in await wrong_proofs(graph):
        sent = await graph.run(SEND, input={"conversationId": "c1", "message": "Hello", **proof})
        assert (sent["sendMessage"]["__typename"], sent["sendMessage"]["code"]) == ("Failure", code)
    assert len(await platform.services.store.list_messages("c1")) == 2


async def test_terminate_stream_is_refused_and_tells_nothing_of_the_stream(graph: Graph, platform: LocalPlatform):
    wanted = {"conversationId": "c1", "message": "Go on [[tokens=500 pace=0.01]]", "password": PASSWORD}
    session = (await graph.run(SEND, input=wanted))["sendMessage"]["id"]
    reply = platform.services.sessions.find(session)
    assert reply is not None
    await reply.stream.wait_beyond(2)
    for proof, _ in await wrong_proofs(graph):
        ended = await graph.run(TERMINATE, input={"sessionId": session, "conversationId": "c1", **proof})
        refused = ended["terminateStream"]
        assert refused["success"] is False and refused["error"]
        assert (refused["partialResponse"], refused["tokenCount"], refused["finalStatus"]) == ("", 0, "ERROR")
    assert (await platform.services.store.get_session(session)).status is SessionStatus.ACTIVE
    mine = {"sessionId": session, "conversationId": "c1", "password": PASSWORD}
    assert (await graph.run(TERMINATE, input=mine))["terminateStream"]["success"] is True


async def test_verify_password_counts_attempts(graph: Graph):
    wrong = {"conversationId": "c1", "password": "wrong"}
    codes = [await graph.refused(VERIFY, input=wrong) for _ in range(6)]
    assert codes == ["FORBIDDEN"] * 5 + ["RATE_LIMITED"]


async def test_the_list_shows_no_private_conversation(graph: Graph):
    listed = await graph.run("{ conversations { count conversations { id } } }")
    assert listed["conversations"] == {"count": 0, "conversations": []}


async def test_a_private_images_url_carries_a_token_that_opens_it(graph: Graph, platform: LocalPlatform):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    for id, proof in (("c1", {"password": PASSWORD}), ("public", {})):
        if id == "public":
            await graph.create(id)
        sent = await graph.run(SEND, input={"conversationId": id, "message": "See", "images": [image], **proof})
        reply = platform.services.sessions.find(sent["sendMessage"]["id"])
        if reply is not None:
            await reply.done.wait()
        query = """query($id: String!, $password: String) { messages(conversationId: $id, password: $password) {
          hasImages images { id filename fileSize mimeType contentHash createdAt url } } }"""
        messages = (await graph.run(query, id=id, **proof))["messages"]
        (found,) = [image for message in messages for image in message["images"]]
        assert [message["hasImages"] for message in messages][-2:] == [True, False]
        assert ("?token=" in found["url"]) is (id == "c1")
        async with platform.client() as client:
            shown = await client.get(found["url"])
            bare = await client.get(found["url"].partition("?")[0])
        assert shown.status_code == 200 and shown.headers["content-type"] == found["mimeType"]
        assert bare.status_code == (401 if id == "c1" else 200)


async def refusal(session: Any, document: str, /, **variables: Any) -> str:
    """The code of the error that a subscription ends with."""
    with pytest.raises(TransportQueryError) as raised:
        async for _ in subscribe(session, document, **variables):
            raise AssertionError("something was shown")
    (error,) = raised.value.errors or ()
    return str(error["extensions"]["code"])


async def test_subscriptions_are_refused(graph: Graph, platform: LocalPlatform):
    session_id = (await ids(platform))["session"]
    async with websocket(await platform.serve()) as session:
        for proof, code in await wrong_proofs(graph):
            assert await refusal(session, STREAM_SESSION, id=session_id, **proof) == code
            wanted = {"conversationId": "c1", "message": "Hello", **proof}
            assert await refusal(session, STREAM_MESSAGE, input=wanted) == code
    assert len(await platform.services.store.list_messages("c1")) == 2


async def test_a_connection_parameter_proves_access(graph: Graph, platform: LocalPlatform):
    session_id = (await ids(platform))["session"]
    verified = await graph.run(VERIFY, input={"conversationId": "c1", "password": PASSWORD})
    token = verified["verifyPassword"]["accessToken"]
    url = await platform.serve()
    for name in ("X-Conversation-Token", "conversationToken"):
        async with websocket(url, **{name: token}) as session:
            seen = [event["streamSession"] async for event in subscribe(session, STREAM_SESSION, id=session_id)]
        assert [event["__typename"] for event in seen] == ["SessionEvent", "TokenEvent", "TokenEvent", "EndEvent"]


async def test_a_message_in_flight_cannot_be_followed_by_others(graph: Graph, platform: LocalPlatform):
    wanted = {"conversationId": "c1", "message": "Go on [[tokens=500 pace=0.01]]", "password": PASSWORD}
    session_id = (await graph.run(SEND, input=wanted))["sendMessage"]["id"]
    async with websocket(await platform.serve()) as session:
        assert await refusal(session, STREAM_SESSION, id=session_id) == "UNAUTHENTICATED"
    await asyncio.wait_for(platform.services.sessions.close(), 5)
