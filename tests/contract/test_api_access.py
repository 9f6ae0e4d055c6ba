"""Who gets in: hosts, origins, API keys, and the proofs of private conversations."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from datetime import timedelta

import bcrypt
import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, WebSocketRoute

from serve_app.api.access import Access
from serve_app.api.errors import OLLAMA_PATHS
from serve_app.domain.conversation import Conversation, StoredImage
from serve_app.store.records import utc_now
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.pictures import encoded
from tests.sse import parse

STREAM, TERMINATE = "/api/stream-message", "/api/terminate-stream"
KEY = "a-key-of-sixteen-characters"
PASSWORD = "open sesame"
SITE = "https://app.example.com"


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every path of the application with a method, parameters filled in."""
    found: list[tuple[str, str]] = []

    def walk(routes: list[BaseRoute], prefix: str = "") -> None:
        for route in routes:
            if isinstance(route, APIRoute):
                path = re.sub(r"\{[^}]*\}", "x", prefix + route.path)
                found.extend((method, path) for method in sorted(route.methods))
            elif not isinstance(route, WebSocketRoute):
                inner = getattr(route, "original_router", None) or getattr(route, "app", None)
                walk(list(getattr(inner, "routes", [])), prefix + getattr(route, "path", ""))

    walk(list(app.routes))
    return found


@pytest.fixture
async def guarded(make_platform: MakePlatform) -> LocalPlatform:
    return await make_platform(api_keys=f"{KEY},another-key-of-sixteen")


async def test_with_keys_every_route_but_health_wants_one(guarded: LocalPlatform) -> None:
    routes = routes_of(guarded.app)
    assert {path for _, path in routes} >= {
        "/health",
        "/ready",
        STREAM,
        f"{STREAM}/x",
        TERMINATE,
        "/api/models",
        "/api/models/x",
        "/api/models/x/load",
        "/api/models/x/unload",
        "/api/models/x/pin",
        "/api/models/x/plan",
        "/api/images/x",
        "/v1/models",
        "/v1/models/x",
        "/v1/chat/completions",
        "/graphql",
        *OLLAMA_PATHS,
    }
    async with guarded.client() as api:
        for method, path in [*routes, ("GET", "/nowhere"), ("GET", "/docs"), ("GET", "/openapi.json")]:
            response = await api.request(method, path)
            if path == "/health":
                assert response.status_code == 200
            else:
                assert response.status_code == 401, (method, path)
                error = response.json()["error"] if method != "HEAD" else ""
                plain = path in OLLAMA_PATHS or method == "HEAD"
                assert isinstance(error, str) if plain else error["code"] == "UNAUTHENTICATED"
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Bearer another-key-of-sixteen", 200),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer \xe4\xf6", 401),
    ],
)
async def test_a_key_is_right_or_wrong(guarded: LocalPlatform, header: str, status: int) -> None:
    async with guarded.client() as api:
        response = await api.get("/ready", headers={"authorization": header.encode("latin-1")})  # type: ignore[dict-item]
    assert response.status_code == status


async def test_the_caller_is_known_by_a_fingerprint_and_never_by_the_key(guarded: LocalPlatform) -> None:
    async with guarded.client(authorization=f"Bearer {KEY}") as api:
        assert parse((await api.post(STREAM, json={"message": "hello [[tokens=1]]"})).text)[-1].name == "end"
    caller = guarded.backend.requests[-1].caller
    assert re.fullmatch(r"key-[0-9a-f]{8}", caller)


async def test_without_keys_everybody_is_anonymous(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    await api.post(STREAM, json={"message": "hello [[tokens=1]]"})
    assert platform.backend.requests[-1].caller == "anonymous"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
async def test_a_foreign_host_is_refused(api: httpx.AsyncClient, host: str, status: int) -> None:
    response = await api.get("/api/models", headers={"host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "FORBIDDEN"


async def test_a_host_pattern_takes_names_below_it(make_platform: MakePlatform) -> None:
    platform = await make_platform(allowed_hosts="*.example.com")
    async with platform.client() as api:
        seen = [(await api.get("/health", headers={"host": host})).status_code for host in HOSTS]
    assert seen == [200, 200, 403, 403]


HOSTS = ("a.example.com", "a.b.example.com:80", "example.com", "notexample.com")


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "localhost", 200),
        ("http://localhost:8000", "localhost:8000", 200),
        ("http://localhost", "localhost:80", 200),
        ("https://localhost", "localhost:443", 200),
        ("http://LOCALHOST:8000", "localhost:8000", 200),
        ("http://localhost:9999", "localhost:8000", 403),
        ("http://evil.example", "localhost:8000", 403),
        ("http://localhost.evil.example:8000", "localhost:8000", 403),
        ("http://evil.example/localhost:8000", "localhost:8000", 403),
        ("null", "localhost:8000", 403),
        ("", "localhost:8000", 403),
        ("localhost:8000", "localhost:8000", 403),
        ("file://", "localhost:8000", 403),
    ],
)
async def test_pages_of_another_site_cannot_post(
    api: httpx.AsyncClient, origin: str | None, host: str, status: int
) -> None:
    headers = {"host": host, **({} if origin is None else {"origin": origin})}
    response = await api.post("/api/models/test/chat/load", headers=headers)
    assert response.status_code == status


async def test_a_foreign_page_can_neither_post_graphql_nor_delete(api: httpx.AsyncClient) -> None:
    headers = {"origin": "http://evil.example"}
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert (await api.request(method, "/graphql", headers=headers)).status_code == 403


async def test_allowed_sites_get_cors_headers_also_on_errors(make_platform: MakePlatform) -> None:
    platform = await make_platform(cors_origins=SITE, api_keys=KEY)
    async with platform.client(origin=SITE) as api:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        preflight = await api.options(STREAM, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == SITE
        refused = await api.post(STREAM, json={"message": "x"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, SITE)
        right = await api.post(STREAM, json={"message": 1}, headers={"authorization": f"Bearer {KEY}"})
        assert (right.status_code, right.headers["access-control-allow-origin"]) == (422, SITE)
        assert "x-trace-id" in right.headers["access-control-expose-headers"].lower()
        foreign = await api.post(STREAM, json={"message": "x"}, headers={"origin": "https://evil.example"})
        assert foreign.status_code == 403
        assert "access-control-allow-origin" not in foreign.headers


async def test_without_cors_origins_a_preflight_is_refused(api: httpx.AsyncClient) -> None:
    headers = {"origin": SITE, "access-control-request-method": "POST"}
    assert (await api.options(STREAM, headers=headers)).status_code == 403


class Private:
    """A private conversation with a finished reply and an image, and every way to reach it over HTTP."""

    def __init__(self, api: httpx.AsyncClient, conversation: Conversation, session: str, image: str) -> None:
        self.api = api
        self.conversation = conversation
        self.session = session
        self.image = image

    async def stream(self, proof: dict[str, str], **headers: str) -> httpx.Response:
        body = {"message": "again [[tokens=1]]", "conversationId": self.conversation.id, **proof}
        return await self.api.post(STREAM, json=body, headers=headers)

    async def terminate(self, proof: dict[str, str], **headers: str) -> httpx.Response:
        body = {"sessionId": self.session, "conversationId": self.conversation.id, **proof}
        return await self.api.post(TERMINATE, json=body, headers=headers)

    async def follow(self, proof: dict[str, str], **headers: str) -> httpx.Response:
        return await self.api.get(f"{STREAM}/{self.session}", params=_token(proof), headers=headers)

    async def show(self, proof: dict[str, str], **headers: str) -> httpx.Response:
        return await self.api.get(f"/api/images/{self.image}", params=_token(proof), headers=headers)


def _token(proof: dict[str, str]) -> dict[str, str]:
    return {"token": proof["token"]} if "token" in proof else {}


@pytest.fixture
async def private(platform: LocalPlatform, api: httpx.AsyncClient) -> AsyncIterator[Private]:
    image = base64.b64encode(encoded("PNG")).decode()
    body = {"message": "secret [[tokens=2]]", "password": PASSWORD, "images": [image]}
    seen = parse((await api.post(STREAM, json=body)).text)
    conversation = await platform.services.store.get_conversation(seen[0].data["conversationId"])
    assert conversation.is_private
    yield Private(api, conversation, seen[0].data["sessionId"], seen[1].data["images"][0]["id"])


WAYS = ["stream", "terminate", "follow", "show"]
WITH_PASSWORD = ["stream", "terminate"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_private_conversation_is_closed_without_proof(private: Private, way: str) -> None:
    response = await getattr(private, way)({})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "UNAUTHENTICATED")
    assert "secret" not in response.text and "word0" not in response.text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("token", ["nonsense", "a.b", "FOREIGN", "IMAGE"])
async def test_a_false_token_opens_nothing(platform: LocalPlatform, private: Private, way: str, token: str) -> None:
    access = platform.services.access
    other = await platform.services.store.create_conversation("other", "Other", password_hash="x")
    foreign = {
        "FOREIGN": access.access_token(other),
        "IMAGE": _other_image_token(access),
    }.get(token, token)
    response = await getattr(private, way)({}, **{"X-Conversation-Token": foreign})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "FORBIDDEN")


def _other_image_token(access: Access) -> str:
    url = access.image_url(_image("other"), True)
    return url.split("token=")[1]


def _image(id: str) -> StoredImage:
    return StoredImage(id, "c", None, "f.png", "f.png", 1, "image/png", "h", utc_now())


@pytest.mark.parametrize("way", WITH_PASSWORD)
async def test_a_wrong_password_is_forbidden(private: Private, way: str) -> None:
    response = await getattr(private, way)({"password": "open barley"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "FORBIDDEN")


@pytest.mark.parametrize("way", WITH_PASSWORD)
async def test_the_password_opens_it(private: Private, way: str) -> None:
    assert (await getattr(private, way)({"password": PASSWORD})).status_code == 200


@pytest.mark.parametrize("way", WAYS)
async def test_an_access_token_opens_it(platform: LocalPlatform, private: Private, way: str) -> None:
    token = platform.services.access.access_token(private.conversation)
    response = await getattr(private, way)({}, **{"X-Conversation-Token": token})
    assert response.status_code == 200
    if way in ("follow", "show"):
        assert (await getattr(private, way)({"token": token})).status_code == 200


async def test_the_url_of_a_private_image_opens_that_image_alone(private: Private, api: httpx.AsyncClient) -> None:
    image = base64.b64encode(encoded("PNG")).decode()
    seen = parse((await private.stream({"password": PASSWORD, "images": [image]})).text)  # type: ignore[dict-item]
    url = seen[1].data["images"][0]["url"]
    assert "token=" in url
    assert (await api.get(url)).status_code == 200
    assert (await api.get(f"/api/images/{private.image}?{url.split('?')[1]}")).status_code == 403


async def test_tokens_expire(platform: LocalPlatform, private: Private) -> None:
    services = platform.services
    early = Access(
        services.store,
        services.passwords,
        await services.store.signing_key(),
        services.settings,
        clock=lambda: utc_now() - timedelta(hours=1, seconds=1),
    )
    token = early.access_token(private.conversation)
    assert (await private.follow({"token": token})).status_code == 401
    assert (await private.show({"token": token})).status_code == 401
    assert (await private.terminate({"password": PASSWORD}, **{"X-Conversation-Token": token})).status_code == 200


async def test_a_token_does_not_open_a_later_conversation_with_the_same_id(platform: LocalPlatform) -> None:
    store, access = platform.services.store, platform.services.access
    first = await store.create_conversation("mine", "Mine", password_hash="x")
    token = access.access_token(first)
    await store.delete_conversation("mine")
    await store.create_conversation("mine", "Not mine", password_hash="y")
    async with platform.client() as api:
        body = {"message": "x", "conversationId": "mine"}
        response = await api.post(STREAM, json=body, headers={"X-Conversation-Token": token})
    assert response.status_code == 403


async def test_the_sixth_wrong_password_of_a_minute_has_to_wait(private: Private) -> None:
    for _ in range(5):
        assert (await private.terminate({"password": "wrong"})).status_code == 403
    response = await private.terminate({"password": PASSWORD})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "RATE_LIMITED")
    assert int(response.headers["retry-after"]) > 0


async def test_right_passwords_are_not_counted(private: Private) -> None:
    for _ in range(7):
        assert (await private.terminate({"password": PASSWORD})).status_code == 200


async def test_a_hash_of_the_chat_service_is_made_anew(platform: LocalPlatform) -> None:
    store = platform.services.store
    old = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    await store.create_conversation("old", "Old", password_hash=old)
    body = {"message": "hello [[tokens=1]]", "conversationId": "old", "password": PASSWORD}
    async with platform.client() as api:
        assert (await api.post(STREAM, json=body)).status_code == 200
        assert (await store.get_conversation("old")).password_hash.startswith("$argon2id$")  # type: ignore[union-attr]
        assert (await api.post(STREAM, json=body)).status_code == 200
        assert (await api.post(STREAM, json={**body, "password": "wrong"})).status_code == 403


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ({}, True),
        ({"Origin": "SAME"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Host": "evil.example"}, False),
    ],
)
async def test_a_websocket_from_another_site_is_refused_at_the_handshake(
    platform: LocalPlatform, headers: dict[str, str], accepted: bool
) -> None:
    url = await platform.serve()
    asked = {name: value.replace("SAME", url) for name, value in headers.items()}
    # Written by hand: a WebSocket library would insist on its own Host.
    lines = {
        "Host": url.removeprefix("http://"),
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(b"0123456789abcdef").decode(),
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": "graphql-transport-ws",
        **asked,
    }
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = "GET /graphql HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"{request}\r\n".encode())
    status = (await reader.readline()).decode()
    writer.close()
    assert status.startswith("HTTP/1.1 101" if accepted else "HTTP/1.1 403")
