"""Answers as they come over the wire, cut at every place, read back."""

import json

import pytest

from benchmarks.arrivals import Planned
from benchmarks.surfaces import SURFACES, events
from benchmarks.wire import Exchange, Target, body_of

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*payloads: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(data), data) for data in payloads) + b"0\r\n\r\n"


def exchange(data: bytes, size: int) -> Exchange:
    """``data`` in pieces of ``size`` bytes, one a second."""
    cut = [data[start : start + size] for start in range(0, len(data), size)]
    return Exchange(0.0, [(float(index), piece) for index, piece in enumerate(cut)])


def event(data: object, name: str | None = None, seq: int = 1) -> bytes:
    head = f"id: {seq}\n" + (f"event: {name}\n" if name else "")
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


@pytest.mark.parametrize("size", range(1, 60))
def test_a_chunked_body_is_the_same_however_it_is_cut(size: int) -> None:
    data = chunked(b"hello ", b"wor\r\nld", b"x" * 40)
    body = b"".join(piece for _, piece in body_of(exchange(data, size)))
    assert body == b"hello wor\r\nld" + b"x" * 40


def test_a_body_without_chunks_is_taken_as_it_is() -> None:
    data = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\nsorry"
    found = exchange(data, 7)
    assert (found.status, found.header("content-length")) == (503, "5")
    assert b"".join(piece for _, piece in body_of(found)) == b"sorry"


@pytest.mark.parametrize("size", [1, 3, 17, 4096])
def test_a_reply_of_the_chat_service_is_read(size: int) -> None:
    data = chunked(
        event({"sessionId": "s1"}, "session", 1),
        b": ping\n\n",
        event({"token": "Grüße", "offset": 0}, None, 2) + event({"token": " an alle", "offset": 5}, None, 3),
        event({"usage": {"promptTokens": 3, "completionTokens": 4}}, "end", 4),
    )
    reply = SURFACES["sse"].read(events(exchange(data, size)))
    assert (reply.text, reply.session, reply.terminals) == ("Grüße an alle", "s1", ["end"])
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 4)
    assert len(reply.times) == 2


def test_two_terminal_events_are_both_seen() -> None:
    data = chunked(event({"usage": {}}, "end", 2), event({"code": "INTERNAL"}, "error", 3))
    assert SURFACES["sse"].read(events(exchange(data, 4096))).terminals == ["end", "error"]


def test_a_time_is_that_of_the_piece_that_completed_the_event() -> None:
    data = chunked(event({"token": "a", "offset": 0}))
    (piece,) = events(exchange(data, 30))
    last_byte = data.index(b"\n\n\r\n0\r\n") + 1
    assert piece.at == last_byte // 30


@pytest.mark.parametrize("name", ["chat", "completions"])
def test_a_reply_of_an_openai_server_is_read(name: str) -> None:
    texts = ["one", " two"]
    chunks = [{"choices": [{"delta": {"content": text}} if name == "chat" else {"text": text}]} for text in texts]
    last = {"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    data = chunked(*(event(chunk) for chunk in [*chunks, last, usage]), b"data: [DONE]\n\n")
    reply = SURFACES[name].read(events(exchange(data, 11)))
    assert (reply.text, reply.terminals, reply.completion_tokens) == ("one two", ["end"], 2)


def test_an_error_inside_an_openai_stream_is_its_end() -> None:
    data = chunked(event({"error": {"message": "no", "type": "server_error", "code": "GENERATION_FAILED"}}))
    reply = SURFACES["chat"].read(events(exchange(data, 4096)))
    assert (reply.terminals, reply.code) == (["error"], "GENERATION_FAILED")


def test_a_subscription_is_read() -> None:
    steps = [
        {"__typename": "SessionEvent", "seq": 1, "sessionId": "s9"},
        {"__typename": "TokenEvent", "seq": 2, "token": "hi", "offset": 0},
        {"__typename": "EndEvent", "seq": 3, "usage": {"promptTokens": 1, "completionTokens": 1}},
    ]
    blocks = [f"event: next\ndata: {json.dumps({'data': {'streamMessage': step}})}\n\n".encode() for step in steps]
    reply = SURFACES["graphql"].read(events(exchange(chunked(*blocks, b"event: complete\ndata: \n\n"), 13)))
    assert (reply.text, reply.session, reply.terminals) == ("hi", "s9", ["end"])
    assert reply.completion_tokens == 1


@pytest.mark.parametrize("name", SURFACES)
def test_a_request_says_how_long_it_is(name: str) -> None:
    planned = Planned(0.0, "a/b", 'quotes " and ü', 16)
    head, _, body = SURFACES[name].request(Target("127.0.0.1", 80), planned, "c1").partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert "a/b" in body.decode()
