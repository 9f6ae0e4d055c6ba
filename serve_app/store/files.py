"""Rows of images, and which files they keep alive: equal files are stored once and shared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import StoredImage
from serve_app.domain.errors import NotFound
from serve_app.store.engine import Database, whole
from serve_app.store.records import NewImage, image_of, new_id
from serve_app.store.tables import images

_T = TypeVar("_T")

# Both databases limit the parameters of one statement (SQLite 32,766; PostgreSQL's protocol 32,767).
_CHUNK = 10_000

LIVE = images.c.deleted_at.is_(None)


def chunks(items: Collection[_T]) -> Iterator[list[_T]]:
    """``items`` in lists that fit into one statement; nearly always one."""
    ordered = list(items)
    for start in range(0, len(ordered), _CHUNK):
        yield ordered[start : start + _CHUNK]


async def insert_images(
    connection: AsyncConnection, conversation_id: str, message_id: str, new: Sequence[NewImage], now: datetime
) -> tuple[StoredImage, ...]:
    """Store the rows of a message's images, in order."""
    stored = tuple(
        StoredImage(
            id=new_id(),
            conversation_id=conversation_id,
            message_id=message_id,
            filename=image.filename,
            file_path=image.file_path,
            file_size=image.file_size,
            mime_type=image.mime_type,
            content_hash=image.content_hash,
            # A microsecond apart, so that they come back in the order in which they were attached.
            created_at=now + timedelta(microseconds=place),
            expires_at=image.expires_at,
        )
        for place, image in enumerate(new)
    )
    if stored:
        await connection.execute(insert(images), [asdict(image) for image in stored])
    return stored


async def images_of(connection: AsyncConnection, message_ids: Collection[str]) -> dict[str, tuple[StoredImage, ...]]:
    """The live images of each message that has some, in the order in which they were attached."""
    found: dict[str, list[StoredImage]] = {}
    for ids in chunks(message_ids):
        query = select(images).where(images.c.message_id.in_(ids), LIVE)
        for row in await connection.execute(query.order_by(images.c.created_at, images.c.id)):
            found.setdefault(row.message_id, []).append(image_of(row))
    return {id: tuple(of_message) for id, of_message in found.items()}


async def orphans(connection: AsyncConnection, paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that no live image refers to any more, sorted."""
    left = set(paths)
    for some in chunks(sorted(left)):
        query = select(images.c.file_path).where(images.c.file_path.in_(some), LIVE).distinct()
        left -= set(await connection.scalars(query))
    return sorted(left)


class Images:
    """The part of the store that knows the image files of messages."""

    _db: Database

    @whole
    async def get_image(self, id: str) -> StoredImage:
        """The image; NotFound, also once it has expired."""
        async with self._db.read() as connection:
            row = (await connection.execute(select(images).where(images.c.id == id, LIVE))).one_or_none()
        if row is None:
            raise NotFound("This image does not exist. It may have been deleted, or its time is over.")
        return image_of(row)

    @whole
    async def unreferenced_files(self, file_paths: Collection[str]) -> list[str]:
        """Those of ``file_paths`` that no live image refers to, sorted."""
        async with self._db.read() as connection:
            return await orphans(connection, file_paths)

    @whole
    async def images_referencing(self, file_path: str) -> list[StoredImage]:
        """The live images that share this file."""
        return await self._live(images.c.file_path == file_path)

    @whole
    async def expired_images(self, now: datetime) -> list[StoredImage]:
        """The live images whose time was over at ``now``."""
        return await self._live(images.c.expires_at <= now)

    @whole
    async def expire_images(self, now: datetime) -> list[str]:
        """Take the images whose time was over at ``now`` out of their messages.

        Returns the paths of the files that nothing refers to any more, for the caller to delete.
        """
        async with self._db.write() as connection:
            expired = update(images).where(images.c.expires_at <= now, LIVE).values(deleted_at=now)
            paths = set(await connection.scalars(expired.returning(images.c.file_path)))
            return await orphans(connection, paths)

    async def _live(self, condition: Any) -> list[StoredImage]:
        query = select(images).where(condition, LIVE).order_by(images.c.created_at, images.c.id)
        async with self._db.read() as connection:
            rows: Iterable[Row[Any]] = await connection.execute(query)
            return [image_of(row) for row in rows]
