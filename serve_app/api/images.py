"""Images on their way in: files, base64, data URIs."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import unquote_to_bytes

from serve_app.api.pictures import Limits, Picture, clean
from serve_app.config import Settings
from serve_app.domain.errors import InvalidInput, PayloadTooLarge, RotundaError
from serve_app.domain.generation import Image
from serve_app.replies import Upload
from serve_app.store.archive import ImageArchive
from serve_app.store.images import ImageFiles
from serve_app.store.records import NewImage

logger = logging.getLogger(__name__)

# Decoding takes a processor and up to a few hundred MB: more at once would only be slower.
_AT_ONCE = 2
_DATA_URI = re.compile(r"data:(?P<type>[^,;]*)(?P<parameters>(?:;[^,;]*)*),", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RawImage:
    """An image as it came, with the name that it came with; nothing about it is known."""

    data: bytes
    filename: str = "image"


@dataclass(frozen=True, slots=True)
class Received:
    """Stored images, ready to go with a message, and what people should know about them."""

    uploads: tuple[Upload, ...] = ()
    warnings: tuple[str, ...] = ()


class ImageIntake:
    """Verifies, cleans and stores images within the limits of the settings. One for all surfaces: it bounds their work.

    Args:
        settings: sizes, types and numbers that are allowed, and how long images are kept.
        files: where their bytes are stored.
        archive: deletes them again when their message is refused.
    """

    def __init__(self, settings: Settings, files: ImageFiles, archive: ImageArchive) -> None:
        self._limits = limits_of(settings)
        self._keep = timedelta(days=settings.image_retention_days) if settings.image_retention_days else None
        self._files = files
        self._archive = archive
        self._turns = asyncio.Semaphore(_AT_ONCE)

    @asynccontextmanager
    async def receive(self, images: Sequence[RawImage | str]) -> AsyncIterator[Received]:
        """Verify all of a message's images, then store them for the block, which stores the message.

        A text is base64 or a data URI. When the block raises, what it has left without a message is deleted again.

        Raises:
            PayloadTooLarge, UnsupportedMedia, InvalidInput: one of them cannot be taken; nothing was stored.
        """
        pictures = await self.verify(images)
        stored: list[Upload] = []
        try:
            for picture in pictures:
                stored.append(await self._store(picture))
            yield Received(tuple(stored), tuple(warning for picture in pictures for warning in picture.warnings))
        except BaseException:
            await self._forget(stored)
            raise
        await self._confirm(stored)

    async def _confirm(self, uploads: Sequence[Upload]) -> None:
        try:
            await self._archive.keep((upload.image.data, upload.image.media_type) for upload in uploads)
        except OSError as error:
            logger.warning("it is not certain that the images of a message are still there: %s", error)

    async def _forget(self, uploads: Sequence[Upload]) -> None:
        try:
            await self._archive.drop([upload.row.file_path for upload in uploads])
        except (RotundaError, OSError) as error:
            logger.warning("the images of a refused message stay until they are collected: %s", error)

    async def verify(self, images: Sequence[RawImage | str]) -> list[Picture]:
        """Verify and clean, without storing anything. Raises as :meth:`receive` does."""
        if len(images) > self._limits.per_message:
            raise InvalidInput(f"{len(images)} images came; a message may have {self._limits.per_message} at most.")
        return [await self._clean(image, f"image-{number}") for number, image in enumerate(images, 1)]

    async def _clean(self, image: RawImage | str, name: str) -> Picture:
        async with self._turns:
            return await asyncio.to_thread(self._clean_now, image, name)

    def _clean_now(self, image: RawImage | str, name: str) -> Picture:
        raw = decode_text(image, name, self._limits.max_bytes) if isinstance(image, str) else image
        return clean(raw.data, raw.filename, self._limits)

    async def _store(self, picture: Picture) -> Upload:
        saved = await self._files.save(picture.data, picture.media_type)
        row = NewImage(
            filename=picture.filename,
            file_path=saved.file_path,
            file_size=saved.file_size,
            mime_type=picture.media_type,
            content_hash=saved.content_hash,
            expires_at=datetime.now(UTC) + self._keep if self._keep else None,
        )
        return Upload(Image(picture.media_type, picture.data), row)


def limits_of(settings: Settings) -> Limits:
    return Limits(
        max_bytes=int(settings.image_max_size_mb * 1_000_000),
        max_pixels=settings.image_max_pixels,
        types=settings.image_allowed_types,
        per_message=settings.max_images_per_message,
    )


def decode_text(text: str, name: str, max_bytes: int) -> RawImage:
    """An image that came as base64 or as a data URI.

    Raises:
        PayloadTooLarge: more bytes than an image may have. InvalidInput: neither form, or an address to fetch.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", text[:40], re.IGNORECASE):
        raise InvalidInput("Images are not fetched from addresses. Send the image itself, as base64 or a data URI.")
    # Percent-encoding takes at most three characters for a byte.
    if len(text) > 4 * max_bytes + 1000:
        raise PayloadTooLarge(f"{name} is too large; an image may have {max_bytes / 1e6:g} MB at most.")
    head = _DATA_URI.match(text[:1000])
    if head is None and text[:5].lower() == "data:":
        raise InvalidInput(f"{name} is not a data URI that can be read.")
    body = text[head.end() :] if head else text
    if head and "base64" not in head["parameters"].lower().split(";"):
        return RawImage(unquote_to_bytes(body), name)
    try:
        return RawImage(_decode_base64(unquote_to_bytes(body) if "%" in body else body.encode()), name)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"{name} is not valid base64.") from error


def _decode_base64(text: bytes) -> bytes:
    compact = b"".join(text.split()).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
    data = base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    if not data:
        raise ValueError("empty")
    return data
