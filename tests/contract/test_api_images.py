"""Images of messages: verified by content, cleaned, stored, and shown to whom they concern."""

from __future__ import annotations

import base64
import io
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from PIL import Image as Pillow

from serve_app.history import GONE
from serve_app.store.archive import ImageArchive
from serve_app.store.records import utc_now
from tests.contract.conftest import MakePlatform
from tests.contract.graphql_client import SEND, Graph
from tests.doubles import LocalPlatform
from tests.pictures import animation, bomb, encoded, photo
from tests.sse import Event, parse

STREAM = "/api/stream-message"
HTML = b"<html><script>alert(1)</script></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


async def send(api: httpx.AsyncClient, *files: tuple[str, bytes, str]) -> httpx.Response:
    parts: list[Any] = [("message", (None, "look [[tokens=1]]"))]
    parts += [("images", (name, data, kind)) for name, data, kind in files]
    return await api.post(STREAM, files=parts)


async def accepted(api: httpx.AsyncClient, *files: tuple[str, bytes, str]) -> list[Event]:
    response = await send(api, *files)
    assert response.status_code == 200, response.text
    return parse(response.text)


async def test_an_uploaded_image_is_told_stored_and_shown_to_the_model(
    platform: LocalPlatform, api: httpx.AsyncClient
) -> None:
    seen = await accepted(api, ("dot.png", encoded("PNG"), "image/png"))
    assert [event.name for event in seen] == ["session", "images", None, "end"]
    told = seen[1].data
    assert (told["processed"], told["warnings"]) == (1, [])
    assert set(told["images"][0]) == {"id", "filename", "url", "size", "mimeType"}
    assert (told["images"][0]["filename"], told["images"][0]["mimeType"]) == ("dot.png", "image/png")
    (image,) = platform.backend.requests[-1].messages[-1].images
    shown = await api.get(told["images"][0]["url"])
    assert shown.status_code == 200
    assert shown.content == image.data
    assert len(shown.content) == told["images"][0]["size"]


async def test_it_is_served_so_that_no_browser_runs_it(api: httpx.AsyncClient) -> None:
    seen = await accepted(api, ('../../"quo\r\nte ü.png', encoded("PNG"), "text/html"))
    shown = await api.get(seen[1].data["images"][0]["url"])
    assert shown.headers["content-type"] == "image/png"
    assert shown.headers["x-content-type-options"] == "nosniff"
    assert shown.headers["cache-control"].startswith("private")
    disposition = shown.headers["content-disposition"]
    assert disposition.startswith("inline; filename*=UTF-8''")
    assert not set('"\r\n/\\ ') & set(disposition.split("''")[1])
    assert quote("ü") in disposition


@pytest.mark.parametrize("form", ["base64", "base64url", "data URI", "percent data URI"])
async def test_json_carries_images_as_text(platform: LocalPlatform, api: httpx.AsyncClient, form: str) -> None:
    data = encoded("PNG")
    text = {
        "base64": base64.b64encode(data).decode(),
        "base64url": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "data URI": "data:image/png;base64," + base64.b64encode(data).decode(),
        "percent data URI": "data:image/png," + quote(data),
    }[form]
    response = await api.post(STREAM, json={"message": "look [[tokens=1]]", "images": [text]})
    assert [event.name for event in parse(response.text)] == ["session", "images", None, "end"]
    assert len(platform.backend.requests[-1].messages[-1].images) == 1


async def test_an_image_alone_is_a_message(api: httpx.AsyncClient) -> None:
    response = await api.post(STREAM, json={"message": "", "images": [base64.b64encode(encoded("PNG")).decode()]})
    assert parse(response.text)[-1].name == "end"


async def test_the_next_message_still_shows_it(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    seen = await accepted(api, ("dot.png", encoded("PNG"), "image/png"))
    body = {"message": "and now? [[tokens=1]]", "conversationId": seen[0].data["conversationId"]}
    assert parse((await api.post(STREAM, json=body)).text)[-1].name == "end"
    assert len(platform.backend.requests[-1].messages[0].images) == 1


async def test_a_conversation_outlives_the_file_of_its_image(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    seen = await accepted(
        api, ("gone.png", encoded("PNG", (4, 4)), "image/png"), ("kept.png", encoded("PNG"), "image/png")
    )
    (first, kept) = seen[1].data["images"]
    row = await platform.services.store.get_image(first["id"])
    platform.services.files.path(row.file_path).unlink()
    body = {"message": "what was it? [[tokens=1]]", "conversationId": seen[0].data["conversationId"]}
    response = await api.post(STREAM, json=body)
    assert (response.status_code, parse(response.text)[-1].name) == (200, "end"), response.text
    before = platform.backend.requests[-1].messages[-3]
    assert len(before.images) == 1
    assert before.text == f"look [[tokens=1]]\n{GONE}"
    assert (await api.get(first["url"])).status_code == 404
    assert (await api.get(kept["url"])).status_code == 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_the_content_decides_not_the_name(api: httpx.AsyncClient, kind: str) -> None:
    seen = await accepted(api, ("picture.bmp", encoded(kind), "application/pdf"))
    assert seen[1].data["images"][0]["mimeType"] == f"image/{kind.lower()}"


@pytest.mark.parametrize(
    ("name", "data", "status", "code"),
    [
        ("page.png", HTML, 415, "UNSUPPORTED_MEDIA"),
        ("drawing.svg", SVG, 415, "UNSUPPORTED_MEDIA"),
        ("empty.png", b"", 415, "UNSUPPORTED_MEDIA"),
        ("scan.tiff", encoded("TIFF"), 415, "UNSUPPORTED_MEDIA"),
        ("cut.png", photo("PNG")[:-60], 422, "INVALID_INPUT"),
        ("cut.jpg", photo("JPEG")[:400], 422, "INVALID_INPUT"),
        ("bomb.png", bomb(), 413, "PAYLOAD_TOO_LARGE"),
    ],
)
async def test_what_is_no_good_image_is_refused(
    platform: LocalPlatform, api: httpx.AsyncClient, name: str, data: bytes, status: int, code: str
) -> None:
    response = await send(api, (name, data, "image/png"))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert name in error["message"]
    assert not list(platform.services.files.root.rglob("*.*"))
    assert await platform.services.store.count_conversations() == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://127.0.0.1:1/x.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("data:image/png;base64", "data URI"),
        ("not base64!", "base64"),
        ("", "base64"),
    ],
)
async def test_text_that_is_no_image_is_refused(api: httpx.AsyncClient, text: str, words: str) -> None:
    response = await api.post(STREAM, json={"message": "x", "images": [text]})
    assert response.status_code == 422
    assert words in response.json()["error"]["message"]


async def test_size_number_and_types_follow_the_settings(make_platform: MakePlatform) -> None:
    platform = await make_platform(image_max_size_mb=0.001, max_images_per_message=1, image_allowed_types="png")
    async with platform.client() as api:
        large = photo("PNG")
        assert len(large) > 1000
        assert (await send(api, ("large.png", large, "image/png"))).status_code == 413
        small = ("dot.png", encoded("PNG"), "image/png")
        assert (await send(api, small, small)).status_code == 422
        assert (await send(api, ("dot.gif", encoded("GIF"), "image/gif"))).status_code == 415
        assert (await send(api, small)).status_code == 200


async def test_an_animation_becomes_its_first_frame_with_a_warning(
    platform: LocalPlatform, api: httpx.AsyncClient
) -> None:
    seen = await accepted(api, ("wave.gif", animation(), "image/gif"))
    assert "first frame" in seen[1].data["warnings"][0]
    (image,) = platform.backend.requests[-1].messages[-1].images
    assert getattr(Pillow.open(io.BytesIO(image.data)), "n_frames", 1) == 1


async def test_an_expired_image_is_gone(make_platform: MakePlatform) -> None:
    platform = await make_platform(image_retention_days=1)
    async with platform.client() as api:
        seen = await accepted(api, ("dot.png", encoded("PNG"), "image/png"))
        url = seen[1].data["images"][0]["url"]
        assert (await api.get(url)).status_code == 200
        await platform.services.store.expire_images(utc_now() + timedelta(days=2))
        assert (await api.get(url)).status_code == 404


async def test_an_image_whose_time_is_over_is_swept_from_message_and_disk(make_platform: MakePlatform) -> None:
    platform = await make_platform(image_retention_days=1)
    services = platform.services
    async with platform.client() as api:
        seen = await accepted(api, ("dot.png", encoded("PNG"), "image/png"))
        conversation = seen[0].data["conversationId"]
        later = ImageArchive(services.store, services.files, lambda: utc_now() + timedelta(days=2))
        assert await services.archive.expire() == 0
        assert await later.expire() == 1
        assert files_of(platform) == []
        assert (await api.get(seen[1].data["images"][0]["url"])).status_code == 404
        # The conversation goes on without it.
        answer = await api.post(STREAM, json={"message": "and now? [[tokens=1]]", "conversationId": conversation})
        assert [event.name for event in parse(answer.text)] == ["session", None, "end"]
    assert platform.backend.requests[-1].messages[0].images == ()


def files_of(platform: LocalPlatform) -> list[str]:
    return sorted(path.name for path in platform.services.files.root.rglob("*") if path.is_file())


REFUSED: tuple[tuple[dict[str, str], int], ...] = (
    ({"model": "nobody"}, 404),
    ({"model": "org/name:tag"}, 422),
    ({"contextPolicy": "error", "message": "long " * 100_001}, 422),
    ({"options": '{"temperature": -1}'}, 422),
    ({"conversationId": "nobody"}, 404),
)


@pytest.mark.parametrize(("fields", "status"), REFUSED)
async def test_a_refused_message_leaves_no_file(
    platform: LocalPlatform, api: httpx.AsyncClient, fields: dict[str, str], status: int
) -> None:
    parts: list[Any] = [(name, (None, value)) for name, value in ({"message": "look"} | fields).items()]
    parts.append(("images", ("dot.png", encoded("PNG"), "image/png")))
    assert (await api.post(STREAM, files=parts)).status_code == status
    assert files_of(platform) == []
    assert await platform.services.store.count_conversations() == 0


async def test_a_message_refused_by_graphql_leaves_no_file(platform: LocalPlatform) -> None:
    graph = Graph(platform)
    await graph.create()
    image = base64.b64encode(encoded("PNG")).decode()
    wanted = {"conversationId": "c1", "message": "look", "images": [image], "model": "org/name:tag"}
    sent = await graph.run(SEND, input=wanted)
    assert sent["sendMessage"]["code"] == "CAPABILITY_MISSING"
    assert files_of(platform) == []


async def test_a_refused_message_costs_no_other_message_its_image(
    platform: LocalPlatform, api: httpx.AsyncClient
) -> None:
    seen = await accepted(api, ("dot.png", encoded("PNG"), "image/png"))
    parts: list[Any] = [("message", (None, "look")), ("model", (None, "nobody"))]
    parts.append(("images", ("dot.png", encoded("PNG"), "image/png")))
    assert (await api.post(STREAM, files=parts)).status_code == 404
    assert (await api.get(seen[1].data["images"][0]["url"])).status_code == 200


async def test_an_unknown_image_is_not_found(api: httpx.AsyncClient) -> None:
    for id in ("unknown", "..%2f..%2fetc%2fpasswd", "%00"):
        assert (await api.get(f"/api/images/{id}")).status_code == 404
