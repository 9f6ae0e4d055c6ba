"""GraphQL over HTTP: methods, media types, statuses; what must not pass does not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from serve_app.api.graphql.router import GRAPHQL, PLAIN, preferred
from tests.contract.conftest import MakePlatform
from tests.contract.graphql_client import Graph
from tests.doubles import LocalPlatform

EVENT_STREAM = {"accept": "text/event-stream"}


async def post(api: httpx.AsyncClient, body: Any, accept: str = GRAPHQL) -> httpx.Response:
    return await api.post("/graphql", json=body, headers={"accept": accept})


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", PLAIN),
        ("*/*", PLAIN),
        ("text/html", PLAIN),
        (PLAIN, PLAIN),
        (GRAPHQL, GRAPHQL),
        (f"{GRAPHQL}; charset=utf-8, {PLAIN}; charset=utf-8", GRAPHQL),
        (f"{GRAPHQL};q=0.5, {PLAIN}", PLAIN),
        (f"{GRAPHQL};q=0, {PLAIN};q=0.1", PLAIN),
        (f"{PLAIN};q=what, {GRAPHQL}", GRAPHQL),
    ],
)
async def test_the_media_type_is_the_one_that_is_asked_for(api: httpx.AsyncClient, accept: str, expected: str):
    assert preferred(accept) == expected
    response = await post(api, {"query": "{ __typename }"}, accept)
    assert response.headers["content-type"] == f"{expected}; charset=utf-8"
    assert response.status_code == 200 and response.json()["data"] == {"__typename": "Query"}


@pytest.mark.parametrize(
    "body",
    [
        {"query": "{"},
        {"query": "{ nothing }"},
        {"query": "query($x: String!) { conversation(id: $x) { id } }"},
        {"query": "query($x: String!) { conversation(id: $x) { id } }", "variables": {"x": 5}},
        {"query": "query A { __typename } query B { __typename }", "operationName": "C"},
    ],
)
async def test_a_request_that_is_not_executed_has_no_data_and_the_status_its_media_type_wants(
    api: httpx.AsyncClient, body: dict[str, Any]
):
    refused = await post(api, body)
    assert refused.status_code == 400 and "data" not in refused.json()
    plain = await post(api, body, PLAIN)
    assert plain.status_code == (400 if "operationName" in body else 200)
    for response in (refused, plain):
        assert response.json()["errors"][0]["extensions"]["code"] == "MALFORMED_REQUEST"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": None},
        {"query": 5},
        {"query": {}},
        {"query": ["{ __typename }"]},
        {"query": "{ __typename }", "variables": "x"},
        {"query": "{ __typename }", "variables": [1]},
        {"query": "{ __typename }", "extensions": 7},
        {"query": "{ __typename }", "operationName": 5},
        [{"query": "{ __typename }"}],
        "query",
        5,
        [],
    ],
)
@pytest.mark.parametrize("accept", [GRAPHQL, PLAIN])
async def test_a_body_of_the_wrong_shape_is_answered_400(api: httpx.AsyncClient, body: Any, accept: str):
    response = await post(api, body, accept)
    assert response.status_code == 400 and "data" not in response.json()
    assert response.json()["errors"][0]["extensions"]["code"] == "MALFORMED_REQUEST"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"query": NaN}', b"1" * 10_000, b"null"])
async def test_a_body_that_is_not_json_is_answered_400(api: httpx.AsyncClient, content: bytes):
    response = await api.post("/graphql", content=content, headers={"content-type": PLAIN})
    assert response.status_code == 400 and response.json()["errors"]


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "text/plain;application/json"]
)
async def test_what_a_page_of_another_site_could_post_is_refused(api: httpx.AsyncClient, content_type: str):
    headers = {"content-type": content_type} if content_type else {}
    response = await api.post("/graphql", content=b'{"query": "{ __typename }"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["errors"][0]["extensions"]["code"] == "UNSUPPORTED_MEDIA"


async def test_utf8_passes_both_ways(api: httpx.AsyncClient):
    body = json.dumps({"query": 'mutation { createConversation(input: {id: "ü", tabName: "日本"}) { message } }'})
    await api.post("/graphql", content=body.encode(), headers={"content-type": "application/json; charset=utf-8"})
    found = (await post(api, {"query": '{ conversation(id: "ü") { tabName } }'})).json()
    assert found["data"]["conversation"]["tabName"] == "日本"


async def test_queries_come_by_get_too(api: httpx.AsyncClient):
    asked = {
        "query": "query Q($id: String!) { conversation(id: $id) { id } }",
        "variables": '{"id": "nobody"}',
        "operationName": "Q",
    }
    response = await api.get("/graphql", params=asked)
    assert response.status_code == 200
    assert response.json()["errors"][0]["extensions"]["code"] == "NOT_FOUND"
    assert (await api.get("/graphql", params=asked | {"variables": "{"})).status_code == 400
    assert (await api.get("/graphql")).status_code == 400


async def test_mutations_do_not_come_by_get(api: httpx.AsyncClient, platform: LocalPlatform):
    query = 'mutation { createConversation(input: {id: "c1", tabName: "t"}) { message } }'
    for headers in ({}, EVENT_STREAM):
        response = await api.get("/graphql", params={"query": query}, headers=headers)
        assert "errors" in response.text and 'data":{' not in response.text
    refused = await api.get("/graphql", params={"query": query})
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    assert await platform.services.store.count_conversations() == 0


async def test_a_message_is_not_sent_by_get(api: httpx.AsyncClient, platform: LocalPlatform):
    await Graph(platform).create()
    query = 'subscription { streamMessage(input: {conversationId: "c1", message: "m"}) { seq } }'
    response = await api.get("/graphql", params={"query": query}, headers=EVENT_STREAM)
    assert "FORBIDDEN" in response.text
    assert await platform.services.store.list_messages("c1") == []


async def test_other_methods_are_not_taken(api: httpx.AsyncClient):
    assert (await api.put("/graphql", json={"query": "{ __typename }"})).status_code == 405


async def test_a_body_that_is_too_large_is_answered_413(make_platform: MakePlatform):
    platform = await make_platform(max_message_chars=1, max_images_per_message=0)
    async with platform.client() as api:
        response = await post(api, {"query": "{ __typename }", "variables": {"x": "x" * 5_000_000}})
    assert response.status_code == 413


async def test_introspection_is_answered(api: httpx.AsyncClient):
    response = await post(api, {"query": "{ __schema { queryType { name } } }"})
    assert response.json()["data"] == {"__schema": {"queryType": {"name": "Query"}}}


async def test_an_api_key_is_wanted_where_there_are_some(make_platform: MakePlatform):
    platform = await make_platform(api_keys="a-key-of-16-chars")
    assert (await Graph(platform).post({"query": "{ __typename }"})).status_code == 401
    graph = Graph(platform, authorization="Bearer a-key-of-16-chars")
    assert await graph.run("{ __typename }") == {"__typename": "Query"}
