"""A GraphQL client for the tests: the ``gql`` package for what works, plain HTTP for what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from gql import Client, GraphQLRequest
from gql.client import AsyncClientSession
from gql.transport import httpx as gql_httpx
from gql.transport.websockets import WebsocketsTransport

from tests.doubles import LocalPlatform

CREATE = """
mutation Create($input: CreateConversationInput!) {
  createConversation(input: $input) {
    message
    conversation { id tabName llmModel isPrivate systemPrompt createdAt updatedAt messageCount messages { id } }
  }
}
"""
ADD = """
mutation Add($input: AddMessageInput!) {
  addMessage(input: $input) {
    message llmModel error llmResponseTime
    userMessage { id conversationId text sender timestamp hasImages images { id } status model provider }
    llmMessage { id text sender status model provider }
  }
}
"""
MESSAGES = """
query Messages($id: String!, $password: String, $token: String) {
  messages(conversationId: $id, password: $password, token: $token) { id text sender status }
}
"""
SEND = """
mutation Send($input: MessageInput!) {
  sendMessage(input: $input) {
    __typename
    ... on StreamSession { id conversationId model provider status traceId }
    ... on Failure { code message retryable traceId }
  }
}
"""
TERMINATE = """
mutation Terminate($input: TerminateStreamInput!) {
  terminateStream(input: $input) {
    success sessionId message partialResponse tokenCount finalStatus terminationReason savedMessageId error
  }
}
"""
EVENTS = """
  __typename seq
  ... on SessionEvent { sessionId conversationId model provider traceId }
  ... on TokenEvent { token offset }
  ... on ImagesEvent { processed warnings images { id url size } }
  ... on EndEvent { messageId finishReason usage { totalTokens completionTokens } timing { totalMs } }
  ... on TerminatedEvent { partialResponse tokenCount reason }
  ... on ErrorEvent { code error retryable traceId }
"""
STREAM_MESSAGE = f"subscription Ask($input: MessageInput!) {{ streamMessage(input: $input) {{ {EVENTS} }} }}"
STREAM_SESSION = (
    "subscription Follow($id: ID!, $after: Int! = 0, $password: String, $token: String) "
    f"{{ streamSession(id: $id, after: $after, password: $password, token: $token) {{ {EVENTS} }} }}"
)


class Graph:
    """GraphQL operations on a platform without a network."""

    def __init__(self, platform: LocalPlatform, **headers: str) -> None:
        self.platform = platform
        self._headers = headers

    async def run(self, document: str, /, **variables: Any) -> dict[str, Any]:
        """The data of an operation that works, by the gql client."""
        # The package may have chosen another release of httpx than this module.
        transport = gql_httpx.HTTPXAsyncTransport(
            "http://localhost/graphql",
            transport=gql_httpx.httpx.ASGITransport(self.platform.app),
            headers=self._headers,
            timeout=30,
        )
        async with Client(transport=transport) as session:
            return await session.execute(GraphQLRequest(document, variable_values=variables))

    async def post(self, body: Any, **headers: str) -> httpx.Response:
        async with self.platform.client(**self._headers) as client:
            return await client.post("/graphql", json=body, headers=headers)

    async def answer(self, document: str, /, **variables: Any) -> dict[str, Any]:
        """The whole response, errors included."""
        answer: dict[str, Any] = (await self.post({"query": document, "variables": variables})).json()
        return answer

    async def refused(self, document: str, /, **variables: Any) -> str:
        """The code of the one error that the operation ends with."""
        answer = await self.answer(document, **variables)
        (error,) = answer["errors"]
        assert set(error["extensions"]) >= {"code", "message", "retryable", "traceId"}
        assert error["extensions"]["message"] == error["message"]
        assert error["extensions"]["traceId"] == answer["extensions"]["traceId"]
        return str(error["extensions"]["code"])

    async def create(self, id: str = "c1", **fields: Any) -> dict[str, Any]:
        answer = await self.run(CREATE, input={"id": id, "tabName": "A talk", **fields})
        conversation: dict[str, Any] = answer["createConversation"]["conversation"]
        return conversation

    async def add(self, text: str, id: str = "c1", sender: str = "user", **fields: Any) -> dict[str, Any]:
        answer = await self.run(ADD, input={"conversationId": id, "text": text, "sender": sender, **fields})
        added: dict[str, Any] = answer["addMessage"]
        return added

    async def texts(self, id: str = "c1", **proof: Any) -> list[tuple[str, str, str]]:
        """Sender, status and text of each message."""
        found = (await self.run(MESSAGES, id=id, **proof))["messages"]
        return [(message["sender"], message["status"], message["text"]) for message in found]


@asynccontextmanager
async def websocket(url: str, **init_payload: str) -> AsyncIterator[AsyncClientSession]:
    """A session of the gql client over graphql-transport-ws."""
    transport = WebsocketsTransport(
        url.replace("http", "ws") + "/graphql",
        init_payload=init_payload,
        subprotocols=[WebsocketsTransport.GRAPHQLWS_SUBPROTOCOL],
        # It waits so long for an answer to what it no longer wants, and the protocol knows none.
        close_timeout=0.1,
    )
    async with Client(transport=transport) as session:
        yield session


def subscribe(session: AsyncClientSession, document: str, /, **variables: Any) -> AsyncIterator[dict[str, Any]]:
    """The data of each result of a subscription."""
    return session.subscribe(GraphQLRequest(document, variable_values=variables))
