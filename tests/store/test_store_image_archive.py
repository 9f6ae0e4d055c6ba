"""Rows and files of images together: what nothing refers to goes, what something refers to stays."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from datetime import timedelta

import pytest

from serve_app.domain.conversation import Conversation
from serve_app.domain.errors import NotFound, ProviderUnavailable
from serve_app.store import ImageFiles, NewImage, Store
from serve_app.store.archive import ImageArchive
from serve_app.store.records import utc_now

DATA = b"\x89PNG and so on"


@pytest.fixture
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    return ImageFiles(tmp_path_factory.mktemp("images"))


@pytest.fixture
def archive(store: Store, files: ImageFiles) -> ImageArchive:
    return ImageArchive(store, files)


async def saved(files: ImageFiles, data: bytes = DATA, days: float | None = None) -> NewImage:
    """A stored file, and the row that would stand for it."""
    file = await files.save(data, "image/png")
    expires = None if days is None else utc_now() + timedelta(days=days)
    return NewImage("cat.png", file.file_path, file.file_size, "image/png", file.content_hash, expires)


def kept(files: ImageFiles) -> list[str]:
    return sorted(path.name for path in files.root.rglob("*") if path.is_file())


async def test_a_file_goes_with_its_last_message_and_not_before(
    store: Store, conversation: Conversation, files: ImageFiles, archive: ImageArchive
) -> None:
    image = await saved(files)
    await store.create_conversation("other", "Other")
    for id in (conversation.id, "other"):
        await store.add_message(id, "look", "user", images=[image])
    assert await archive.drop(await store.delete_conversation(conversation.id)) == 0
    assert await archive.drop([image.file_path]) == 0
    assert await files.read(image.file_path) == DATA
    assert await archive.drop(await store.delete_conversation("other")) == 1
    assert kept(files) == []


async def test_images_are_deleted_when_their_time_is_over(
    store: Store, conversation: Conversation, files: ImageFiles, archive: ImageArchive
) -> None:
    over, lasting, shared = await saved(files, b"over", -1), await saved(files, b"lasting", 1), await saved(files)
    await store.add_message(conversation.id, "look", "user", images=[over, lasting])
    await store.add_message(conversation.id, "again", "user", images=[shared])
    late = await saved(files, DATA, -1)
    await store.add_message(conversation.id, "late", "user", images=[late])
    assert await archive.expire() == 1
    assert await archive.expire() == 0
    messages = await store.list_messages(conversation.id)
    assert [[image.file_path for image in message.images] for message in messages] == [
        [lasting.file_path],
        [shared.file_path],
        [],
    ]
    with pytest.raises(NotFound):
        await files.read(over.file_path)
    assert await files.read(shared.file_path) == DATA


async def test_files_that_no_message_came_for_are_collected_once_they_are_old(
    store: Store, conversation: Conversation, files: ImageFiles, archive: ImageArchive
) -> None:
    orphan, wanted, young = await saved(files, b"orphan"), await saved(files, b"wanted"), await saved(files, b"young")
    await store.add_message(conversation.id, "look", "user", images=[wanted])
    for image in (orphan, wanted):
        os.utime(files.path(image.file_path), (1e9, 1e9))
    assert await archive.collect() == 1
    assert kept(files) == sorted(files.path(image.file_path).name for image in (wanted, young))


async def test_a_message_that_comes_during_the_deletion_keeps_its_file(
    store: Store, conversation: Conversation, files: ImageFiles
) -> None:
    """The row is stored after the first look at the rows and before the second."""
    image = await saved(files)

    class Late(Store):
        looks = 0

        async def unreferenced_files(self, file_paths: Collection[str]) -> list[str]:
            self.looks += 1
            if self.looks == 2:
                assert kept(files)[0].startswith(".")
                await store.add_message(conversation.id, "look", "user", images=[image])
            return await store.unreferenced_files(file_paths)

    assert await ImageArchive(Late(store._db), files).drop([image.file_path]) == 0
    assert await files.read(image.file_path) == DATA


async def test_a_message_that_comes_after_the_deletion_stores_its_file_again(
    store: Store, conversation: Conversation, files: ImageFiles, archive: ImageArchive
) -> None:
    image = await saved(files)
    assert await archive.drop([image.file_path]) == 1
    await store.add_message(conversation.id, "look", "user", images=[image])
    await archive.keep([(DATA, "image/png")])
    assert await files.read(image.file_path) == DATA


async def test_a_store_that_does_not_answer_costs_no_file(store: Store, files: ImageFiles) -> None:
    image = await saved(files)

    class Failing(Store):
        looks = 0

        async def unreferenced_files(self, file_paths: Collection[str]) -> list[str]:
            self.looks += 1
            if self.looks == 2:
                raise ProviderUnavailable("The conversation store cannot be reached now.")
            return list(file_paths)

    with pytest.raises(ProviderUnavailable):
        await ImageArchive(Failing(store._db), files).drop([image.file_path])
    assert await files.read(image.file_path) == DATA


async def test_the_rounds_go_on_after_a_failure(store: Store, conversation: Conversation, files: ImageFiles) -> None:
    image = await saved(files, days=-1)
    await store.add_message(conversation.id, "look", "user", images=[image])

    class Once(Store):
        failed = False

        async def expire_images(self, now: object) -> list[str]:
            if not self.failed:
                self.failed = True
                raise ProviderUnavailable("The conversation store cannot be reached now.")
            return await store.expire_images(utc_now())

    running = asyncio.create_task(ImageArchive(Once(store._db), files).run(every_s=0.01))
    try:
        async with asyncio.timeout(10):
            while kept(files):  # noqa: ASYNC110 - files have no event to wait for
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
