"""Conversations over HTTP with the shipped models: the right answer needs history, system prompt, pixels."""

from __future__ import annotations

import io
import json
import threading
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

from tests.cluster import Cluster, sse_events, wait_until

CHAT, VISION, SLOW = "rotunda/tiny-chat", "rotunda/tiny-vision", "test/slow"

Event = tuple[str | None, str | None, str]


class Reply:
    """A whole stream: its events in order, and what they add up to."""

    def __init__(self, events: list[Event]) -> None:
        self.ids = [int(identifier or 0) for identifier, _, _ in events]
        self.names = [name or "token" for _, name, _ in events]
        self.payloads = [json.loads(data) for _, _, data in events]

    def of(self, name: str) -> dict[str, Any]:
        return dict(self.payloads[self.names.index(name)])

    @property
    def text(self) -> str:
        return "".join(data["token"] for name, data in zip(self.names, self.payloads, strict=True) if name == "token")

    @property
    def conversation(self) -> str:
        return str(self.of("session")["conversationId"])


def ask(cluster: Cluster, message: str, model: str = CHAT, heard: list[Event] | None = None, **body: Any) -> Reply:
    """The whole reply; ``heard`` gets each event as it comes."""
    payload = {"message": message, "model": model, **body}
    events: list[Event] = [] if heard is None else heard
    with cluster.client() as client, client.stream("POST", "/api/stream-message", json=payload) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        events.extend(sse_events(answer.iter_lines()))
        return Reply(events)


def picture(shape: str, colour: str, size: tuple[int, int] = (180, 140)) -> bytes:
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    box = (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4)
    draw.ellipse(box, fill=colour) if shape == "circle" else draw.rectangle(box, fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_sum_is_streamed_in_order_with_one_terminal_event(cluster: Cluster) -> None:
    reply = ask(cluster, "What is 17 + 25?")
    assert reply.text == "17 + 25 = 42."
    assert reply.ids == list(range(1, len(reply.ids) + 1))
    assert reply.names[0] == "session" and reply.names[-1] == "end"
    assert not {"end", "terminated", "error"} & set(reply.names[:-1])
    end = reply.of("end")
    assert end["finishReason"] == "stop"
    assert end["usage"]["totalTokens"] == end["usage"]["promptTokens"] + end["usage"]["completionTokens"]
    assert end["timing"]["totalMs"] >= end["timing"]["ttftMs"] > 0


def test_the_second_answer_needs_the_first_turn(cluster: Cluster) -> None:
    first = ask(cluster, "My name is Zorana.")
    second = ask(cluster, "What is my name?", conversationId=first.conversation)
    assert second.text == "Your name is Zorana."
    assert "Zorana" not in ask(cluster, "What is my name?").text


def test_the_system_prompt_sets_the_persona(cluster: Cluster) -> None:
    assert "Orla" in ask(cluster, "Who are you?", systemPrompt="You are Orla, a lighthouse keeper.").text
    assert "Orla" not in ask(cluster, "Who are you?").text


@pytest.mark.parametrize(("shape", "colour"), [("circle", "red"), ("square", "blue")])
def test_an_image_is_answered_from_its_pixels(cluster: Cluster, shape: str, colour: str) -> None:
    files = {"images": (f"{shape}.png", picture(shape, colour), "image/png")}
    fields = {"message": "What colour is the shape?", "model": VISION}
    with cluster.client() as client:
        with client.stream("POST", "/api/stream-message", data=fields, files=files) as answer:
            assert answer.status_code == 200, answer.read()
            first = Reply(list(sse_events(answer.iter_lines())))
        assert colour in first.text.lower()
        shown = first.of("images")
        assert shown["processed"] == 1
        stored = client.get(shown["images"][0]["url"])
        assert stored.headers["content-type"] == "image/png"
        assert stored.headers["x-content-type-options"] == "nosniff"
    # The image of the first turn is still before the model's eyes in the second.
    second = ask(cluster, "What shape is it?", VISION, conversationId=first.conversation)
    assert shape in second.text.lower()


def test_a_text_model_refuses_an_image_before_the_stream_opens(cluster: Cluster) -> None:
    files = {"images": ("a.png", picture("circle", "red"), "image/png")}
    with cluster.client() as client:
        answer = client.post("/api/stream-message", data={"message": "What is it?", "model": CHAT}, files=files)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "CAPABILITY_MISSING"
    assert VISION in answer.json()["error"]["message"]


def test_bad_input_gets_a_typed_error_in_plain_words(cluster: Cluster) -> None:
    ask(cluster, "Hello")  # resident, so that the model's own refusals come as statuses too
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"message": "hi", "model": "rotunda/tiny-chad"}, 404, "MODEL_NOT_FOUND"),
        ({"message": "   ", "model": CHAT}, 422, "INVALID_INPUT"),
        ({"message": "hi", "model": CHAT, "conversationId": "nobody"}, 404, "NOT_FOUND"),
        ({"message": "hi", "model": CHAT, "options": {"temperature": 9}}, 422, "INVALID_INPUT"),
        ({"message": "word " * 5000, "model": CHAT}, 422, "CONTEXT_LENGTH_EXCEEDED"),
        ({"message": "hi", "model": VISION, "images": ["bm90IGFuIGltYWdl"]}, 415, "UNSUPPORTED_MEDIA"),
    ]
    with cluster.client() as client:
        for body, status, code in cases:
            answer = client.post("/api/stream-message", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
            assert answer.json()["error"]["traceId"] == answer.headers["x-trace-id"]
        answer = client.post("/api/stream-message", json={"message": "hi", "model": "rotunda/tiny-chad"})
        assert CHAT in answer.json()["error"]["message"]


def start_and_read(cluster: Cluster, body: dict[str, Any], tokens: int) -> tuple[threading.Thread, Reply]:
    """Read a stream in a thread; returns once ``tokens`` data events have come. The reply fills up until it ends."""
    events: list[tuple[str | None, str | None, str]] = []
    enough = threading.Event()
    reply = Reply([])

    def read() -> None:
        with cluster.client() as client, client.stream("POST", "/api/stream-message", json=body) as answer:
            for event in sse_events(answer.iter_lines()):
                events.append(event)
                if sum(name is None for _, name, _ in events) >= tokens:
                    enough.set()
        reply.__init__(events)  # type: ignore[misc]

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert enough.wait(60)
    reply.__init__(list(events))  # type: ignore[misc]
    return thread, reply


@pytest.mark.parametrize(
    ("model", "message", "whole"), [(SLOW, "anything", 500), (CHAT, "Count from 1 to 250.", 900)], ids=["slow", "chat"]
)
def test_a_stream_ended_half_way_keeps_its_partial_text_and_stops_the_engine(
    cluster: Cluster, model: str, message: str, whole: int
) -> None:
    ask(cluster, "[[tokens=1]]" if model == SLOW else "Hello", model)
    before = cluster.model(model)
    thread, reply = start_and_read(cluster, {"message": message, "model": model}, tokens=5)
    session = reply.of("session")
    body = {"sessionId": session["sessionId"], "conversationId": session["conversationId"]}
    answer = httpx.post(f"{cluster.url}/api/terminate-stream", json=body, timeout=30)
    ended = answer.json()
    assert answer.status_code == 200 and ended["success"], ended
    assert (ended["finalStatus"], ended["terminationReason"]) == ("TERMINATED", "USER_REQUESTED")
    thread.join(30)
    assert reply.names[-1] == "terminated"
    assert reply.text == ended["partialResponse"] == reply.of("terminated")["partialResponse"]
    assert 5 <= ended["tokenCount"] < whole

    def stopped() -> dict[str, Any] | None:
        now = cluster.model(model)
        return now if now["running"] == 0 and now["cancelledCount"] == before["cancelledCount"] + 1 else None

    made = wait_until(stopped, what="the engine to stop")["tokensGenerated"] - before["tokensGenerated"]
    assert ended["tokenCount"] <= made < whole / 2
    query = "query($id: String!) { messages(conversationId: $id) { id text sender status } }"
    stored = httpx.post(
        f"{cluster.url}/graphql", json={"query": query, "variables": {"id": session["conversationId"]}}
    ).json()["data"]["messages"]
    assert stored[-1] == {
        "id": ended["savedMessageId"],
        "text": ended["partialResponse"],
        "sender": "llm",
        "status": "terminated",
    }
    again = httpx.post(f"{cluster.url}/api/terminate-stream", json=body, timeout=30).json()
    assert (again["success"], again["finalStatus"]) == (False, "TERMINATED")


def test_a_conversation_has_one_running_reply_and_a_second_is_told_which(cluster: Cluster) -> None:
    thread, reply = start_and_read(cluster, {"message": "[[tokens=100]]", "model": SLOW}, tokens=2)
    session = reply.of("session")
    body = {"message": "again", "model": SLOW, "conversationId": session["conversationId"]}
    answer = httpx.post(f"{cluster.url}/api/stream-message", json=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "CONVERSATION_BUSY")
    assert answer.json()["error"]["details"]["sessionId"] == session["sessionId"]
    thread.join(30)
    assert reply.names[-1] == "end"


def statuses(cluster: Cluster, session: dict[str, Any]) -> list[str]:
    """Of the messages of the session's conversation."""
    query = "query($id: String!) { messages(conversationId: $id) { status } }"
    body = {"query": query, "variables": {"id": session["conversationId"]}}
    answer = httpx.post(f"{cluster.url}/graphql", json=body, timeout=30).json()
    return [message["status"] for message in answer["data"]["messages"]]


def test_a_client_that_cancels_on_disconnect_stops_the_engine(cluster: Cluster) -> None:
    ask(cluster, "[[tokens=1]]", SLOW)
    body = {"message": "anything", "model": SLOW, "onDisconnect": "cancel"}
    with cluster.client() as client, client.stream("POST", "/api/stream-message", json=body) as answer:
        for _, (_, name, data) in zip(range(5), sse_events(answer.iter_lines()), strict=False):
            if name == "session":
                session = json.loads(data)
    wait_until(lambda: cluster.model(SLOW)["running"] == 0, what="the engine to stop")
    wait_until(lambda: statuses(cluster, session) == ["complete", "terminated"], what="the partial text to be stored")


def test_a_reply_outlives_a_client_that_leaves_at_once(cluster: Cluster) -> None:
    ask(cluster, "[[tokens=1]]", SLOW)
    body = {"message": "[[tokens=100]]", "model": SLOW, "onDisconnect": "detach"}
    with cluster.client() as client, client.stream("POST", "/api/stream-message", json=body) as answer:
        session = json.loads(next(sse_events(answer.iter_lines()))[2])
    wait_until(lambda: statuses(cluster, session) == ["complete", "complete"], 30, what="the whole reply to be stored")
