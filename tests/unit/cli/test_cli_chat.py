"""``rotunda chat`` against a server that is a function: streaming, resuming, stopping."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from serve_app.cli.app import app
from serve_app.cli.run import Outside
from serve_app.domain.events import Ended, Event, Failed, Loading, Queued, SessionOpened, Switched, Terminated, Token
from serve_app.domain.generation import FinishReason, Timing, Usage

SESSION = SessionOpened("s-1", "c-1", "tiny-chat", "huggingface", "trace-1")
END = Ended("m-1", Usage(prompt_tokens=3, completion_tokens=2), Timing(), FinishReason.STOP)
Piece = Event | bytes | BaseException


def encode(events: list[Piece], first: int = 1) -> Iterator[bytes]:
    for seq, event in enumerate(events, first):
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, bytes):
            yield event
            continue
        name = f"event: {event.name}\n" if event.name else ""
        yield f"id: {seq}\n{name}data: {json.dumps(event.payload())}\n\n".encode()


class Body(httpx.SyncByteStream):
    def __init__(self, events: list[Piece], first: int) -> None:
        self._events, self._first = events, first

    def __iter__(self) -> Iterator[bytes]:
        return encode(self._events, self._first)


class Server:
    """Answers each call with the next of ``answers``: a list of events, a response, or an error. Keeps the requests."""

    def __init__(self, *answers: list[Piece] | httpx.Response | Exception, first: int = 1) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.naps: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        after = int(request.headers.get("last-event-id", 0))
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Body(answer, after + 1))

    def chat(self, *words: str, input: str | None = None, interactive: bool = False) -> Result:
        world = Outside(httpx.MockTransport(self), self.naps.append, lambda: interactive)
        return CliRunner().invoke(app, ["chat", "tiny-chat", *words], obj=world, input=input)

    def sent(self, index: int = 0) -> Any:
        return json.loads(self.requests[index].content)


def test_a_reply_is_printed_as_it_comes() -> None:
    server = Server([SESSION, b": ping\n\n", Token("Hel", 0), Token("lo\u2028!", 3), END])
    result = server.chat("Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\u2028!\n", "")
    assert server.sent() == {"model": "tiny-chat", "message": "Hi"}
    assert server.requests[0].url.path == "/api/stream-message"


def test_all_options_are_sent(tmp_path: Path) -> None:
    (tmp_path / "dot.PNG").write_bytes(b"png")
    server = Server([SESSION, END])
    server.chat(
        "Hi", "--system", "Be brief", "--image", str(tmp_path / "dot.PNG"), "--max-tokens", "5", "--temperature", "0",
        "--conversation", "c-1",
    )  # fmt: skip
    assert server.sent() == {
        "model": "tiny-chat",
        "message": "Hi",
        "systemPrompt": "Be brief",
        "images": [f"data:image/png;base64,{base64.b64encode(b'png').decode()}"],
        "options": {"maxTokens": 5, "temperature": 0},
        "conversationId": "c-1",
    }


def test_the_message_may_come_from_standard_input() -> None:
    server = Server([SESSION, END], [SESSION, END])
    server.chat(input="from a pipe\n")
    server.chat("-", input="too\n")
    assert [server.sent(index)["message"] for index in range(2)] == ["from a pipe\n", "too\n"]


@pytest.mark.parametrize("words", [[], ["  "], ["-"]])
def test_no_message_is_bad_input(words: list[str]) -> None:
    result = Server().chat(*words, input="")
    assert result.exit_code == 2
    assert "There is no message" in result.stderr


@pytest.mark.parametrize(("name", "words"), [("a.svg", "is not an image that can"), ("a.png", "cannot be read")])
def test_a_wrong_image_is_bad_input(name: str, words: str, tmp_path: Path) -> None:
    result = Server().chat("Hi", "--image", str(tmp_path / name))
    assert result.exit_code == 2
    assert words in result.stderr


def test_json_is_one_object_and_nothing_else() -> None:
    events: list[Piece] = [SESSION, Queued(1, "busy", 2000), Loading("tiny-chat"), Token("Hello", 0), END]
    result = Server(events).chat("Hi", "--json")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["status"], answer["conversationId"]) == ("Hello", "complete", "c-1")
    assert answer["usage"] == END.usage.to_json()
    assert (answer["finishReason"], answer["traceId"], answer["error"]) == ("stop", "trace-1", None)
    assert result.stderr == ""


def test_no_spinner_without_a_terminal() -> None:
    result = Server([SESSION, Queued(1, "busy", None), Token("x", 0), END]).chat("Hi")
    assert (result.stdout, result.stderr) == ("x\n", "")


def test_a_switch_is_said() -> None:
    result = Server([SESSION, Token("a", 0), Switched("one", "two", "it died"), Token("b", 1), END]).chat("Hi")
    assert result.stdout == "a\nb\n"
    assert result.stderr == "[two goes on for one: it died]\n"


def test_an_error_in_the_stream_keeps_the_partial_text() -> None:
    failed = Failed("GENERATION_FAILED", "The model broke.", "huggingface", False, "trace-1", {})
    result = Server([SESSION, Token("par", 0), failed]).chat("Hi")
    assert (result.exit_code, result.stdout) == (1, "par\n")
    assert result.stderr == "The model broke. (trace trace-1)\n"
    as_json = Server([SESSION, Token("par", 0), failed]).chat("Hi", "--json")
    assert json.loads(as_json.stdout)["error"]["code"] == "GENERATION_FAILED"
    assert as_json.exit_code == 1


def test_an_error_before_the_stream_is_one_line() -> None:
    fault = {"error": {"code": "MODEL_NOT_FOUND", "message": "There is no such model.", "retryable": False}}
    result = Server(httpx.Response(404, json=fault)).chat("Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "There is no such model.\n")


def test_another_server_is_recognised() -> None:
    result = Server(httpx.Response(200, text="<html>")).chat("Hi")
    assert "not as Rotunda does" in result.stderr
    result = Server([b"data: hello\n\n"]).chat("Hi")
    assert "is not JSON" in result.stderr


def test_a_termination_by_somebody_else_is_said() -> None:
    result = Server([SESSION, Token("par", 0), Terminated("s-1", "par", 1, "ADMIN")]).chat("Hi")
    assert result.exit_code == 1
    assert result.stderr == "The reply was terminated (ADMIN); 1 tokens are kept.\n"


def test_ctrl_c_terminates_the_stream_and_keeps_the_partial() -> None:
    answer = {"success": True, "partialResponse": "partial", "tokenCount": 3, "finalStatus": "TERMINATED"}
    server = Server([SESSION, Token("part", 0), KeyboardInterrupt()], httpx.Response(200, json=answer))
    result = server.chat("Hi")
    assert (result.exit_code, result.stdout) == (130, "partial\n")
    assert result.stderr == "Stopped; the reply so far is kept (3 tokens).\n"
    assert server.requests[1].url.path == "/api/terminate-stream"
    assert server.sent(1) == {"sessionId": "s-1", "conversationId": "c-1", "reason": "USER_REQUESTED"}


def test_ctrl_c_in_json_mode_still_answers() -> None:
    answer = {"success": True, "partialResponse": "partial", "tokenCount": 3}
    server = Server([SESSION, Token("part", 0), KeyboardInterrupt()], httpx.Response(200, json=answer))
    result = server.chat("Hi", "--json")
    assert result.exit_code == 130
    assert (json.loads(result.stdout)["text"], json.loads(result.stdout)["status"]) == ("partial", "terminated")


def test_ctrl_c_before_there_is_a_session_just_leaves() -> None:
    server = Server([KeyboardInterrupt()])
    assert server.chat("Hi").exit_code == 130
    assert len(server.requests) == 1


def test_a_failed_termination_is_said() -> None:
    server = Server([SESSION, KeyboardInterrupt()], httpx.ConnectError("gone"))
    result = server.chat("Hi")
    assert result.exit_code == 130
    assert "could not be terminated: No server can be reached" in result.stderr


@pytest.mark.parametrize("breaks", [httpx.ReadError("reset"), httpx.RemoteProtocolError("cut"), b"data: {"])
def test_a_broken_connection_is_resumed_where_it_was(breaks: Piece) -> None:
    server = Server([SESSION, Token("Hel", 0), breaks], [Token("lo", 3), END])
    result = server.chat("Hi")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert server.requests[1].method == "GET"
    assert server.requests[1].url.path == "/api/stream-message/s-1"
    assert server.requests[1].headers["last-event-id"] == "2"
    assert server.naps == [1.0]


def test_text_beyond_the_log_is_dropped_and_shown_again() -> None:
    rewind = b'id: 2\nevent: rewind\ndata: {"seq": 2, "offset": 3}\n\n'
    server = Server([SESSION, Token("Hel", 0), Token("XX", 3), httpx.ReadError("x")], [rewind, Token("lo", 3), END])
    result = server.chat("Hi")
    assert result.stdout == "HelXX\nHello\n"
    again = Server([SESSION, Token("Hel", 0), Token("XX", 3), httpx.ReadError("x")], [rewind, Token("lo", 3), END])
    assert json.loads(again.chat("Hi", "--json").stdout)["text"] == "Hello"


def test_a_server_that_is_not_ready_to_resume_is_asked_again() -> None:
    busy = {"error": {"code": "PROVIDER_UNAVAILABLE", "message": "Later.", "details": {"retryAfterS": 2}}}
    rewind = b'event: rewind\ndata: {"seq": 0, "offset": 0}\n\n'
    server = Server(
        [SESSION, Token("Hel", 0), httpx.ReadError("x")],
        httpx.ConnectError("restarting"),
        httpx.Response(503, json=busy),
        [rewind, httpx.ReadError("x")],
        [SESSION, Token("Hello", 0), END],
    )
    result = server.chat("Hi", "--json")
    assert json.loads(result.stdout)["text"] == "Hello"
    assert server.naps == [1.0, 1.0, 2, 1.0]
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, "2", "2", "2", "0"]


def test_a_session_that_is_gone_is_not_asked_for_again() -> None:
    gone = {"error": {"code": "NOT_FOUND", "message": "There is no such session.", "retryable": False}}
    result = Server([SESSION, httpx.ReadError("x")], httpx.Response(404, json=gone)).chat("Hi")
    assert (result.exit_code, result.stderr) == (2, "There is no such session.\n")


def test_resuming_ends_at_some_point() -> None:
    server = Server([SESSION, httpx.ReadError("x")], *([httpx.ReadError("x")] for _ in range(5)))
    result = server.chat("Hi")
    assert result.exit_code == 1
    assert "broke off" in result.stderr
    assert len(server.requests) == 6


def test_a_stream_that_never_began_is_not_resumed() -> None:
    result = Server([]).chat("Hi")
    assert "closed the stream before it began" in result.stderr
    assert Server([httpx.ReadError("x")]).chat("Hi").exit_code == 1


def test_a_conversation_goes_on_in_one_place() -> None:
    server = Server([SESSION, Token("one", 0), END], [SESSION, Token("two", 0), END])
    result = server.chat("--system", "Be brief", input="first\nsecond\n\nnever\n", interactive=True)
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\n")
    assert server.sent(0) == {"model": "tiny-chat", "message": "first", "systemPrompt": "Be brief"}
    assert server.sent(1) == {"model": "tiny-chat", "message": "second", "conversationId": "c-1"}


def test_ctrl_c_in_a_conversation_stops_the_reply_only() -> None:
    server = Server([SESSION, KeyboardInterrupt()], httpx.Response(200, json={"tokenCount": 0}), [SESSION, END])
    assert server.chat(input="first\nsecond\n", interactive=True).exit_code == 0
    assert len(server.requests) == 3


def test_escape_codes_of_a_model_do_not_reach_the_terminal() -> None:
    assert Server([SESSION, Token("\x1b]0;owned\x07hi", 0), END]).chat("Hi").stdout == "]0;ownedhi\n"
