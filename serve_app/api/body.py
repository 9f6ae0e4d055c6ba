"""Request bodies: bounded while they arrive, then read as JSON or as a form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.images import RawImage
from serve_app.api.validation import StrictModel, parse_json, read
from serve_app.config import Settings
from serve_app.domain.errors import InvalidInput, PayloadTooLarge, UnsupportedMedia
from serve_app.domain.generation import ContextPolicy, Options, Priority

# Names, options, histories of a few long conversations: everything beside the message and its images.
_REST_BYTES = 4_000_000
# JSON may spell a character as \uXXXX.
_BYTES_PER_CHARACTER = 6
_MOST_FORM_FILES = 128
_BOUNDED_ELSEWHERE = 2**40
_LIST_FIELDS = frozenset({"fallbackModels"})
_JSON_FIELDS = frozenset({"options"})


def most_bytes(settings: Settings) -> int:
    """The size of the largest request that can make sense: the longest message with the largest images as base64."""
    images = settings.max_images_per_message * math.ceil(settings.image_max_size_mb * 1_000_000 * 4 / 3)
    return settings.max_message_chars * _BYTES_PER_CHARACTER + images + _REST_BYTES


class BodyLimit:
    """ASGI middleware: refuses a body of more than ``limit`` bytes, by its announced length and while it arrives."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._limit):
            raise self._too_large()
        received = 0

        async def receive_counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, receive_counting, send)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The request is larger than {self._limit / 1e6:.3g} MB. Send less, or smaller images.")


class MessageOptions(StrictModel):
    """How the reply is sampled; ranges are the domain's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None

    def to_options(self) -> Options:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Options(self.temperature, self.top_p, self.top_k, self.max_tokens, tuple(stop), self.seed)


class StreamMessage(StrictModel):
    """The body of ``POST /api/stream-message`` without its images."""

    message: str
    model: str | None = None
    conversation_id: str | None = None
    system_prompt: str | None = None
    password: str | None = None
    options: MessageOptions = MessageOptions()
    priority: Literal["high", "normal", "low"] = "high"
    fallback_models: list[str] = Field(default_factory=list)
    on_disconnect: Literal["cancel", "detach"] = "detach"
    context_policy: ContextPolicy = "truncate"

    @property
    def order(self) -> Priority:
        return Priority[self.priority.upper()]


class TerminateStream(StrictModel):
    """The body of ``POST /api/terminate-stream``."""

    session_id: str
    conversation_id: str
    password: str | None = None
    reason: str | None = None


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_body(request: Request) -> Any:
    """The body as a JSON value.

    Raises:
        UnsupportedMedia: it is declared as something else. MalformedRequest: it is not JSON.
    """
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMedia(f"Send the body as application/json, not as {kind or 'nothing in particular'}.")
    return parse_json(await request.body())


async def stream_message(request: Request) -> tuple[StreamMessage, list[RawImage | str]]:
    """The message and its images, from JSON or from a form. A field that is null counts as left out."""
    if media_type(request) == "multipart/form-data":
        async with request.form(max_files=_MOST_FORM_FILES, max_part_size=_BOUNDED_ELSEWHERE) as form:
            fields, images = await _read_form(form)
    else:
        value = await json_body(request)
        fields = dict(value) if isinstance(value, Mapping) else value
        images = _images_of(fields)
    if isinstance(fields, dict):
        fields = {name: value for name, value in fields.items() if value is not None}
    return read(StreamMessage, fields), images


def _images_of(fields: Any) -> list[RawImage | str]:
    images = fields.pop("images", None) if isinstance(fields, dict) else None
    if images is None:
        return []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InvalidInput("images must be a list of texts: base64 or data URIs.")
    return list(images)


async def _read_form(form: FormData) -> tuple[dict[str, Any], list[RawImage | str]]:
    fields: dict[str, Any] = {}
    images: list[RawImage | str] = []
    for name, value in form.multi_items():
        if name == "images":
            images.append(await _raw(value) if isinstance(value, UploadFile) else value)
        elif isinstance(value, UploadFile):
            raise InvalidInput(f"{name} must not be a file; files belong into images.")
        elif name in _LIST_FIELDS:
            fields.setdefault(name, []).extend(_listed(name, value))
        elif name in fields:
            raise InvalidInput(f"{name} was given twice.")
        else:
            fields[name] = parse_json(value, name) if name in _JSON_FIELDS else value
    return fields, images


async def _raw(upload: UploadFile) -> RawImage:
    return RawImage(await upload.read(), upload.filename or "image")


def _listed(name: str, value: str) -> list[Any]:
    if not value.lstrip().startswith("["):
        return [value]
    parsed = parse_json(value, name)
    return parsed if isinstance(parsed, list) else [parsed]
