"""What is refused before a stream opens: with a status, a code, and words for the person who sent it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.api.body import most_bytes
from serve_app.domain.catalog import ModelState
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform

STREAM = "/api/stream-message"
JSON = {"content-type": "application/json"}
LONG = " ".join(["word"] * 100)


def refusal(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) - {"details"} == {"code", "message", "provider", "retryable", "traceId"}
    assert error["traceId"] == response.headers["x-trace-id"]
    return dict(error)


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({}, 422, "INVALID_INPUT", "message is missing"),
        ({"message": None}, 422, "INVALID_INPUT", "message is missing"),
        ({"message": 5}, 422, "INVALID_INPUT", "message must be text"),
        ({"message": ""}, 422, "INVALID_INPUT", "empty"),
        ({"message": "  \n"}, 422, "INVALID_INPUT", "empty"),
        ({"message": "x" * 100_001}, 422, "INVALID_INPUT", "100,000"),
        ({"message": "x", "mesage": "y"}, 422, "INVALID_INPUT", "mesage is not a field"),
        ({"message": "x", "conversation_id": "c"}, 422, "INVALID_INPUT", "conversation_id is not a field"),
        ({"message": "x", "options": {"temperature": 2.1}}, 422, "INVALID_INPUT", "temperature"),
        ({"message": "x", "options": {"temperature": "hot"}}, 422, "INVALID_INPUT", "options.temperature"),
        ({"message": "x", "options": {"temperature": True}}, 422, "INVALID_INPUT", "options.temperature"),
        ({"message": "x", "options": {"topP": 0}}, 422, "INVALID_INPUT", "topP"),
        ({"message": "x", "options": {"topK": -1}}, 422, "INVALID_INPUT", "topK"),
        ({"message": "x", "options": {"maxTokens": 0}}, 422, "INVALID_INPUT", "maxTokens"),
        ({"message": "x", "options": {"maxTokens": 1.5}}, 422, "INVALID_INPUT", "whole number"),
        ({"message": "x", "options": {"seed": -1}}, 422, "INVALID_INPUT", "seed"),
        ({"message": "x", "options": {"seed": 2**70}}, 422, "INVALID_INPUT", "seed"),
        ({"message": "x", "options": {"stop": [""]}}, 422, "INVALID_INPUT", "stop"),
        ({"message": "x", "options": {"stop": ["s"] * 17}}, 422, "INVALID_INPUT", "stop"),
        ({"message": "x", "options": {"heat": 1}}, 422, "INVALID_INPUT", "options.heat is not a field"),
        ({"message": "x", "options": []}, 422, "INVALID_INPUT", "options must be an object"),
        ({"message": "x", "priority": "urgent"}, 422, "INVALID_INPUT", "'high', 'normal' or 'low'"),
        ({"message": "x", "onDisconnect": "wait"}, 422, "INVALID_INPUT", "onDisconnect"),
        ({"message": "x", "contextPolicy": "shrink"}, 422, "INVALID_INPUT", "contextPolicy"),
        ({"message": "x", "fallbackModels": "one"}, 422, "INVALID_INPUT", "fallbackModels must be a list"),
        ({"message": "x", "images": "abc"}, 422, "INVALID_INPUT", "images must be a list"),
        ({"message": "x", "images": [{}]}, 422, "INVALID_INPUT", "images must be a list"),
        ({"message": "x", "model": "nobody/nothing"}, 404, "MODEL_NOT_FOUND", "nobody/nothing"),
        ({"message": "x", "model": "test/chatt"}, 404, "MODEL_NOT_FOUND", "test/chat"),
        ({"message": "x", "conversationId": "nowhere"}, 404, "NOT_FOUND", "does not exist"),
        (
            {"message": LONG, "model": "org/name:tag", "contextPolicy": "error"},
            422,
            "CONTEXT_LENGTH_EXCEEDED",
            "",
        ),
        ({"message": "[[error=MODEL_UNSAFE]]"}, 422, "MODEL_UNSAFE", ""),
        ([], 422, "INVALID_INPUT", "JSON object"),
        ("hello", 422, "INVALID_INPUT", "JSON object"),
    ],
)
async def test_bad_input_is_refused_in_plain_words_and_leaves_nothing_behind(
    platform: LocalPlatform, api: httpx.AsyncClient, body: Any, status: int, code: str, words: str
) -> None:
    response = await api.post(STREAM, json=body)
    error = refusal(response)
    assert (response.status_code, error["code"], error["retryable"]) == (status, code, False)
    assert words in error["message"]
    assert await platform.services.store.count_conversations() == 0
    assert platform.engine.counters().running == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"message": NaN}',
        b'{"message": "x", "options": {"temperature": Infinity}}',
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"message": ' + b"9" * 5000 + b"}",
        rb'{"message": "half a character: \uD800"}',
    ],
    ids=["empty", "cut", "text", "NaN", "Infinity", "bytes", "deep list", "deep object", "long number", "surrogate"],
)
async def test_what_is_not_json_is_malformed(api: httpx.AsyncClient, content: bytes) -> None:
    response = await api.post(STREAM, content=content, headers=JSON)
    assert (response.status_code, refusal(response)["code"]) == (400, "MALFORMED_REQUEST")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", None])
async def test_another_content_type_is_not_guessed_at(api: httpx.AsyncClient, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    response = await api.post(STREAM, content=b'{"message": "x"}', headers=headers)
    assert (response.status_code, refusal(response)["code"]) == (415, "UNSUPPORTED_MEDIA")


@pytest.mark.parametrize(
    ("parts", "status", "words"),
    [
        ([("message", (None, "x")), ("message", (None, "y"))], 422, "twice"),
        ([("message", (None, "x")), ("surprise", (None, "y"))], 422, "surprise is not a field"),
        ([("message", (None, "x")), ("model", ("model.txt", b"y"))], 422, "model must not be a file"),
        ([("message", (None, "x")), ("options", (None, "{"))], 400, "options is not valid JSON"),
        ([("message", (None, "x")), ("options", (None, "[1]"))], 422, "options must be an object"),
        ([("model", (None, "x"))], 422, "message is missing"),
        ([("message", (None, "x" * 5_000_000))], 422, "100,000"),
    ],
)
async def test_a_form_is_judged_as_strictly(api: httpx.AsyncClient, parts: Any, status: int, words: str) -> None:
    response = await api.post(STREAM, files=parts)
    assert response.status_code == status
    assert words in refusal(response)["message"]


async def test_a_broken_form_is_malformed(api: httpx.AsyncClient) -> None:
    headers = {"content-type": "multipart/form-data"}
    response = await api.post(STREAM, content=b"nonsense", headers=headers)
    assert (response.status_code, refusal(response)["code"]) == (400, "MALFORMED_REQUEST")


async def test_an_image_for_a_model_that_cannot_see_names_those_that_can(api: httpx.AsyncClient, png: str) -> None:
    response = await api.post(STREAM, json={"message": "x", "model": "org/name:tag", "images": [png]})
    error = refusal(response)
    assert (response.status_code, error["code"]) == (422, "CAPABILITY_MISSING")
    assert error["details"]["capable"] == ["test/chat"]


async def test_without_a_model_or_a_default_the_choice_is_listed(make_platform: MakePlatform) -> None:
    platform = await make_platform(default_model=None)
    async with platform.client() as api:
        error = refusal(await api.post(STREAM, json={"message": "x"}))
    assert (error["code"], error["details"]["models"]) == ("INVALID_INPUT", ["org/name:tag", "test/chat"])


async def test_a_model_that_cannot_load_says_why(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    platform.router.put("test/chat", ModelState.FAILED)
    response = await api.post(STREAM, json={"message": "x"})
    error = refusal(response)
    assert (response.status_code, error["code"]) == (502, "MODEL_LOAD_FAILED")
    assert (error["message"], error["provider"]) == ("A file is missing.", "huggingface")


async def test_an_announced_length_is_refused_before_a_byte_is_read(
    platform: LocalPlatform, api: httpx.AsyncClient
) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {**JSON, "content-length": str(most_bytes(platform.services.settings) + 1)}
    response = await api.post(STREAM, content=never(), headers=headers)
    assert (response.status_code, refusal(response)["code"]) == (413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize("path", [STREAM, "/graphql", "/v1/chat/completions", "/api/terminate-stream"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
async def test_an_endless_body_is_cut_off_while_it_arrives(make_platform: MakePlatform, path: str, kind: str) -> None:
    platform = await make_platform(max_images_per_message=0, max_message_chars=10)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\ncontent-disposition: form-data; name="images"; filename="f"\r\n\r\n'
        while True:
            sent += 100_000
            yield b"x" * 100_000

    async with platform.client() as api:
        response = await api.post(path, content=endless(), headers={"content-type": kind})
    assert response.status_code == 413 or (response.status_code == 415 and path != STREAM)
    assert sent <= most_bytes(platform.services.settings) + 200_000


async def test_an_endless_body_over_a_real_connection_gets_its_answer(make_platform: MakePlatform) -> None:
    platform = await make_platform(max_images_per_message=0, max_message_chars=10)

    async def long() -> AsyncIterator[bytes]:
        for _ in range(60):
            yield b"x" * 100_000

    async with await platform.connect() as api:
        try:
            response = await api.post(STREAM, content=long(), headers=JSON)
        except httpx.WriteError:
            return  # the server has answered and hung up while the client was still sending
    assert response.status_code == 413


async def test_errors_name_no_path_and_no_library(api: httpx.AsyncClient) -> None:
    for body in ({"message": 1}, {"message": "x", "images": ["data:image/png;base64,AAAA"]}):
        text = json.dumps(refusal(await api.post(STREAM, json=body))).lower()
        assert not any(word in text for word in ("pydantic", "pillow", "traceback", "site-packages", "/home", "/work"))
