"""The operations that clients of the chat service use, one by one."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest
from sqlalchemy import Engine, event

from serve_app.domain.catalog import ModelState
from serve_app.domain.conversation import SessionStatus
from serve_app.domain.fleet import ProviderStatus
from serve_app.store.records import NewImage
from tests.contract.conftest import MakePlatform
from tests.contract.graphql_client import ADD, CREATE, MESSAGES, TERMINATE, Graph
from tests.doubles import LocalPlatform


@pytest.fixture
def graph(platform: LocalPlatform) -> Graph:
    return Graph(platform)


async def running_session(platform: LocalPlatform, conversation: str = "c1") -> str:
    """The id of the session that runs in the conversation, once its first token is there."""
    while True:
        for session in await platform.services.store.list_sessions(conversation, SessionStatus.ACTIVE):
            reply = platform.services.sessions.find(session.id)
            if reply is not None and reply.text:
                return session.id
        await asyncio.sleep(0.01)


async def test_create_conversation(graph: Graph):
    made = await graph.create(llmModel="test/chat", systemPrompt="Be brief.")
    assert made["id"] == "c1" and made["tabName"] == "A talk" and made["llmModel"] == "test/chat"
    assert made["systemPrompt"] == "Be brief." and made["isPrivate"] is False
    assert made["messages"] == [] and made["messageCount"] == 0
    assert datetime.fromisoformat(made["createdAt"]).tzinfo is not None


async def test_create_conversation_without_a_model_has_an_empty_one(graph: Graph):
    assert (await graph.create())["llmModel"] == ""


@pytest.mark.parametrize("fields", [{"id": ""}, {"id": "x" * 201}, {"tabName": "  "}, {"password": "x" * 1025}])
async def test_create_conversation_refuses_senseless_fields(graph: Graph, fields: dict[str, str]):
    assert await graph.refused(CREATE, input={"id": "c1", "tabName": "t", **fields}) == "INVALID_INPUT"


async def test_create_conversation_refuses_a_taken_id(graph: Graph):
    await graph.create()
    assert await graph.refused(CREATE, input={"id": "c1", "tabName": "t"}) == "INVALID_INPUT"


async def test_conversations_lists_public_ones_newest_activity_first(graph: Graph):
    for id in ("old", "new", "newest"):
        await graph.create(id)
    await graph.create("secret", password="hunter2")
    await graph.add("Hello", "old", sender="llm")
    listed = await graph.run("{ conversations { count conversations { id messageCount messages { text } } } }")
    assert [one["id"] for one in listed["conversations"]["conversations"]] == ["old", "newest", "new"]
    assert listed["conversations"]["count"] == 3
    assert listed["conversations"]["conversations"][0]["messages"] == [{"text": "Hello"}]
    assert listed["conversations"]["conversations"][0]["messageCount"] == 1


async def test_conversations_in_pages(graph: Graph):
    for number in range(5):
        await graph.create(f"c{number}")
    page = "query($after: String) { conversations(limit: 2, after: $after) { count nextCursor conversations { id } } }"
    seen, cursor = [], None
    while True:
        found = (await graph.run(page, after=cursor))["conversations"]
        seen += [one["id"] for one in found["conversations"]]
        cursor = found["nextCursor"]
        if cursor is None:
            break
    assert seen == ["c4", "c3", "c2", "c1", "c0"]
    assert await graph.refused("{ conversations(limit: 0) { count } }") == "INVALID_INPUT"
    assert await graph.refused('{ conversations(after: "?") { count } }') == "INVALID_INPUT"


@pytest.mark.parametrize("page", ["", "(limit: 2)", "(last: 2)"])
async def test_many_conversations_take_as_many_statements_as_one(graph: Graph, platform: LocalPlatform, page: str):
    query = f"{{ conversations {{ conversations {{ id messageCount messages{page} {{ text images {{ id }} }} }} }} }}"
    statements: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    async def statements_of() -> int:
        statements.clear()
        found = (await graph.run(query))["conversations"]["conversations"]
        assert all(len(message["images"]) == 1 for one in found for message in one["messages"])
        return len(statements)

    async def fill(id: str) -> None:
        await graph.create(id)
        for text in "ab":
            picture = NewImage(f"{text}.png", "ab/cd.png", 1, "image/png", "abcd")
            await platform.services.store.add_message(id, text, "user", images=[picture])

    platform.ticking.cancel()
    event.listen(Engine, "before_cursor_execute", note)
    try:
        await fill("c0")
        alone = await statements_of()
        for number in range(1, 20):
            await fill(f"c{number}")
        assert await statements_of() == alone
    finally:
        event.remove(Engine, "before_cursor_execute", note)


async def test_conversation_by_id(graph: Graph):
    await graph.create()
    await graph.add("One", sender="llm")
    found = await graph.run('{ conversation(id: "c1") { id messages { text sender } } }')
    assert found["conversation"]["messages"] == [{"text": "One", "sender": "llm"}]
    assert await graph.refused('{ conversation(id: "nobody") { id } }') == "NOT_FOUND"


async def test_messages_in_pages(graph: Graph):
    await graph.create()
    ids = [(await graph.add(str(number), sender="llm"))["userMessage"]["id"] for number in range(5)]
    page = (
        "query($limit: Int, $after: String, $before: String, $last: Int) { "
        'messages(conversationId: "c1", limit: $limit, after: $after, before: $before, last: $last) { text } '
        'conversation(id: "c1") { messages(limit: $limit, after: $after, before: $before, last: $last) { text } } }'
    )
    for variables, expected in (
        ({}, "01234"),
        ({"limit": 2}, "01"),
        ({"limit": 2, "after": ids[1]}, "23"),
        ({"limit": 2, "before": ids[4]}, "23"),
        ({"after": ids[4]}, ""),
        ({"last": 2}, "34"),
        ({"last": 9}, "01234"),
        ({"last": 2, "before": ids[3]}, "12"),
    ):
        found = await graph.run(page, **variables)
        assert "".join(message["text"] for message in found["messages"]) == expected
        assert found["conversation"]["messages"] == found["messages"]
    too_many = '{ messages(conversationId: "c1", limit: 501) { id } }'
    assert await graph.refused(too_many) == "INVALID_INPUT"
    for both in ("last: 1, limit: 1", f'last: 1, after: "{ids[0]}"', "last: 0"):
        assert await graph.refused(f'{{ messages(conversationId: "c1", {both}) {{ id }} }}') == "INVALID_INPUT"


async def test_messages_of_an_unknown_conversation(graph: Graph):
    assert await graph.refused(MESSAGES, id="nobody") == "NOT_FOUND"


async def test_available_models(graph: Graph, platform: LocalPlatform):
    platform.router.put("org/name:tag", ModelState.COLD)
    platform.router.providers += (ProviderStatus("far", "openai", "error", 0, "connection refused"),)
    query = """{ availableModels { models count
      items { name provider task capabilities state pinned sizeBytes memoryBytes contextLength quantization loadedAt
              lastUsedAt requestCount errorCount averageResponseMs replicas reason }
      providers { name status error modelCount } } }"""
    found = (await graph.run(query))["availableModels"]
    assert found["models"] == ["org/name:tag", "test/chat"] and found["count"] == 2
    cold, ready = found["items"]
    assert (cold["state"], cold["replicas"], cold["contextLength"]) == ("cold", 0, 64)
    assert (ready["state"], ready["provider"], ready["pinned"]) == ("ready", "huggingface", False)
    assert ready["capabilities"] == ["chat", "completion", "vision"]
    assert [(one["name"], one["status"], one["error"]) for one in found["providers"]] == [
        ("huggingface", "ok", None),
        ("far", "error", "connection refused"),
    ]


async def test_add_message_asks_the_model(graph: Graph):
    await graph.create(systemPrompt="Be brief.")
    added = await graph.add("Say it [[tokens=3]]")
    assert added["error"] is None and added["llmModel"] == "test/chat" and added["llmResponseTime"] >= 0
    assert added["userMessage"]["text"] == "Say it [[tokens=3]]" and added["userMessage"]["sender"] == "user"
    reply = added["llmMessage"]
    assert (reply["text"], reply["sender"], reply["status"]) == ("word0 word1 word2", "llm", "complete")
    assert (reply["model"], reply["provider"]) == ("test/chat", "huggingface")
    assert [sender for sender, _, _ in await graph.texts()] == ["user", "llm"]


async def test_the_system_prompt_reaches_the_model(graph: Graph, platform: LocalPlatform):
    await graph.create(systemPrompt="The conversation's.")
    await graph.add("Hello [[tokens=1]]")
    await graph.add("Hello [[tokens=1]]", systemPrompt="The message's.")
    first, second = platform.backend.requests
    assert first.messages[0].text == "The conversation's." and second.messages[0].text == "The message's."


async def test_add_message_of_a_model_only_stores(graph: Graph, platform: LocalPlatform):
    await graph.create(llmModel="test/chat")
    added = await graph.add("I said so.", sender="llm")
    assert added["userMessage"]["sender"] == "llm" and added["userMessage"]["model"] == "test/chat"
    assert added["llmMessage"] is None and added["error"] is None and added["llmResponseTime"] is None
    assert platform.backend.requests == []


@pytest.mark.parametrize(("sender", "text"), [("robot", "Hello"), ("", "Hello"), ("user", " \n"), ("llm", "")])
async def test_add_message_refuses_other_senders_and_empty_texts(graph: Graph, sender: str, text: str):
    await graph.create()
    refused = {"conversationId": "c1", "text": text, "sender": sender}
    assert await graph.refused(ADD, input=refused) == "INVALID_INPUT"
    assert await graph.texts() == []


async def test_a_message_that_is_too_long_is_refused(make_platform: MakePlatform):
    graph = Graph(await make_platform(max_message_chars=10))
    await graph.create()
    refused = {"conversationId": "c1", "text": "x" * 11, "sender": "user"}
    assert await graph.refused(ADD, input=refused) == "INVALID_INPUT"


async def test_the_users_message_is_kept_when_the_model_fails(graph: Graph):
    await graph.create()
    added = await graph.add("Break [[fail_at=2 tokens=9]]")
    assert added["llmMessage"] is None and added["error"] == "The script asked for this failure."
    assert added["userMessage"]["text"].startswith("Break")
    user, partial = await graph.texts()
    assert user[:2] == ("user", "complete")
    assert partial == ("llm", "error", "word0 word1")


@pytest.mark.parametrize(
    ("text", "model"),
    [("Refuse [[error=MODEL_LOAD_FAILED]]", None), ("Hello", "no/such-model"), ("word " * 99, "org/name:tag")],
)
async def test_the_users_message_is_kept_when_no_model_can_begin(graph: Graph, text: str, model: str | None):
    await graph.create()
    added = await graph.add(text, llmModel=model)
    assert added["llmMessage"] is None and added["error"]
    assert await graph.texts() == [("user", "complete", text)]


async def test_a_busy_conversation_refuses_a_second_message(graph: Graph, platform: LocalPlatform):
    await graph.create()
    first = asyncio.create_task(graph.add("Go on [[tokens=500 pace=0.01]]"))
    session = await running_session(platform)
    refused = {"conversationId": "c1", "text": "Me too", "sender": "user"}
    answer = await graph.answer(ADD, input=refused)
    assert answer["errors"][0]["extensions"]["code"] == "CONVERSATION_BUSY"
    assert answer["errors"][0]["extensions"]["details"] == {"sessionId": session}
    await graph.run(TERMINATE, input={"sessionId": session, "conversationId": "c1"})
    await first
    assert [sender for sender, _, _ in await graph.texts()] == ["user", "llm"]


async def test_terminate_half_way_through_add_message(graph: Graph, platform: LocalPlatform):
    await graph.create()
    adding = asyncio.create_task(graph.add("Go on [[tokens=500 pace=0.01]]"))
    session = await running_session(platform)
    ended = (await graph.run(TERMINATE, input={"sessionId": session, "conversationId": "c1"}))["terminateStream"]
    assert ended["success"] is True and ended["sessionId"] == session and ended["error"] is None
    assert (ended["finalStatus"], ended["terminationReason"]) == ("TERMINATED", "USER_REQUESTED")
    assert ended["partialResponse"].startswith("word0") and ended["tokenCount"] > 0 and ended["savedMessageId"]
    added = await adding
    assert added["llmMessage"] is None and "USER_REQUESTED" in added["error"]
    assert (await graph.texts())[1] == ("llm", "terminated", ended["partialResponse"])


async def test_terminate_stream_says_what_is_in_the_way(graph: Graph):
    await graph.create()
    await graph.create("c2")
    await graph.add("Hello [[tokens=1]]")
    (session,) = await graph.platform.services.store.list_sessions("c1")
    ended = {"sessionId": session.id, "conversationId": "c1"}
    for wrong, words in (
        (ended, "already ended (COMPLETED)"),
        (ended | {"reason": "boredom"}, "USER_REQUESTED"),
        (ended | {"sessionId": "nobody"}, "does not exist"),
        (ended | {"conversationId": "c2"}, "another conversation"),
        (ended | {"conversationId": "nobody"}, "does not exist"),
    ):
        answer = (await graph.run(TERMINATE, input=wrong))["terminateStream"]
        assert answer["success"] is False and words in answer["error"] and answer["message"] == answer["error"]


async def test_delete_conversation_terminates_its_stream_first(graph: Graph, platform: LocalPlatform):
    await graph.create()
    adding = asyncio.create_task(
        graph.answer(ADD, input={"conversationId": "c1", "text": "Go on [[tokens=500 pace=0.01]]", "sender": "user"})
    )
    session = await running_session(platform)
    deleted = await graph.run(
        'mutation { deleteConversation(conversationId: "c1") { message conversationId success } }'
    )
    assert deleted["deleteConversation"]["success"] is True and deleted["deleteConversation"]["conversationId"] == "c1"
    assert platform.services.sessions.find(session) is None
    assert platform.engine.counters().running == 0
    await adding
    assert await graph.refused('{ conversation(id: "c1") { id } }') == "NOT_FOUND"


async def test_delete_messages_after_keeps_the_message_itself(graph: Graph):
    await graph.create()
    ids = [(await graph.add(str(number), sender="llm"))["userMessage"]["id"] for number in range(4)]
    delete = """mutation($id: ID!) {
      deleteMessagesAfter(conversationId: "c1", messageId: $id) { message deletedCount success } }"""
    deleted = (await graph.run(delete, id=ids[1]))["deleteMessagesAfter"]
    assert (deleted["deletedCount"], deleted["success"]) == (2, True)
    assert [text for _, _, text in await graph.texts()] == ["0", "1"]
    assert await graph.refused(delete, id=ids[3]) == "NOT_FOUND"


async def test_verify_password(graph: Graph):
    await graph.create(password="hunter2")
    verify = """mutation($input: VerifyPasswordInput!) {
      verifyPassword(input: $input) { message conversationId tabName accessToken } }"""
    verified = (await graph.run(verify, input={"conversationId": "c1", "password": "hunter2"}))["verifyPassword"]
    assert (verified["conversationId"], verified["tabName"]) == ("c1", "A talk")
    assert await graph.texts(token=verified["accessToken"]) == []
    assert await graph.refused(verify, input={"conversationId": "c1", "password": "wrong"}) == "FORBIDDEN"
    assert await graph.refused(verify, input={"conversationId": "no", "password": "wrong"}) == "NOT_FOUND"


async def test_warmup_ollama_loads_the_default_model(graph: Graph, platform: LocalPlatform):
    platform.router.put("test/chat", ModelState.COLD)
    warm = "mutation { warmupOllama { message models count status } }"
    warmed = (await graph.run(warm))["warmupOllama"]
    assert warmed["models"] == ["org/name:tag", "test/chat"] and warmed["count"] == 2
    assert warmed["status"] == "ready"


async def test_warmup_ollama_without_a_default_says_so(make_platform: MakePlatform):
    graph = Graph(await make_platform(default_model=None))
    warmed = (await graph.run("mutation { warmupOllama { message models count status } }"))["warmupOllama"]
    assert warmed["status"] == "error" and "warmup(model)" in warmed["message"]
