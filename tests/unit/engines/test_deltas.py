"""What deltas and requests carry survives being joined and crossing a process border."""

from __future__ import annotations

import pickle

from serve_app.domain.generation import Delta, GenerationRequest, JsonFormat, Message, Options, Role, Text, TokenLogprob
from serve_app.domain.tools import Tool, ToolCall, ToolCallPart, ToolUse
from serve_app.frames import merged

FIRST = Delta("a", (1,), "hm", (ToolCallPart(0, "{}", "id", "f"),), (TokenLogprob(1, "a", -0.1, b"a"),))
SECOND = Delta("b", (2, 3), ", so", (ToolCallPart(1, "{}", "id2", "g"),), (TokenLogprob(2, "b", -0.2, b"b"),))


def test_a_frame_joins_all_that_deltas_carry() -> None:
    (both,) = merged([FIRST, SECOND], most_tokens=3)
    assert both == FIRST + SECOND == Delta.joined([FIRST, SECOND])
    assert isinstance(both, Delta)
    assert (both.text, both.token_ids, both.reasoning) == ("ab", (1, 2, 3), "hm, so")
    assert [part.index for part in both.tool_calls] == [0, 1] and len(both.logprobs) == 2
    assert merged([FIRST, SECOND], most_tokens=2) == [FIRST, SECOND]


def test_requests_and_deltas_cross_a_process_border() -> None:
    call = ToolCall("id", "f", "{}")
    messages = (
        Message.of("user", "x"),
        Message(Role.ASSISTANT, (), (call,)),
        Message(Role.TOOL, (Text("5"),), (), "id", "f"),
    )
    options = Options(logit_bias={1: 2.0}, response_format=JsonFormat({"type": "object"}))
    request = GenerationRequest("r", "m", messages, options, tools=ToolUse((Tool("f", parameters={"a": [1]}),)))
    assert pickle.loads(pickle.dumps(request)) == request
    assert pickle.loads(pickle.dumps(FIRST)) == FIRST
