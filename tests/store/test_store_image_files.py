"""Image files: named by content, written whole, never outside their folder."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from serve_app.domain.errors import NotFound, UnsupportedMedia
from serve_app.store import ImageFiles

DATA = b"\x89PNG and so on"


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return ImageFiles(tmp_path / "images")


def stored(files: ImageFiles) -> list[Path]:
    return sorted(path for path in files.root.rglob("*") if path.is_file())


async def test_an_image_is_stored_under_its_content(files: ImageFiles) -> None:
    saved = await files.save(DATA, "image/png")
    digest = hashlib.sha256(DATA).hexdigest()
    assert (saved.content_hash, saved.file_size) == (digest, len(DATA))
    assert saved.file_path == f"{digest[:2]}/{digest}.png"
    assert await files.read(saved.file_path) == DATA


async def test_equal_images_are_one_file(files: ImageFiles) -> None:
    saved = await asyncio.gather(*(files.save(DATA, "image/jpeg") for _ in range(8)))
    assert len(set(saved)) == 1
    assert stored(files) == [files.path(saved[0].file_path)]
    before = files.path(saved[0].file_path).stat().st_ino
    await files.save(DATA, "image/jpeg")
    assert files.path(saved[0].file_path).stat().st_ino == before


async def test_a_damaged_file_is_written_again(files: ImageFiles) -> None:
    saved = await files.save(DATA, "image/png")
    files.path(saved.file_path).write_bytes(DATA[:3])
    await files.save(DATA, "image/png")
    assert await files.read(saved.file_path) == DATA


async def test_a_write_that_fails_leaves_nothing(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        await files.save(DATA, "image/png")
    assert stored(files) == []


@pytest.mark.parametrize("mime_type", ["image/svg+xml", "text/html", "", "../../x"])
async def test_other_types_are_not_stored(files: ImageFiles, mime_type: str) -> None:
    with pytest.raises(UnsupportedMedia):
        await files.save(DATA, mime_type)


@pytest.mark.parametrize("file_path", ["../outside.png", "ab/../../outside.png", "", ".", "a\x00b", "x" * 5000, "ab"])
async def test_no_path_leads_out_of_the_folder(files: ImageFiles, tmp_path: Path, file_path: str) -> None:
    (tmp_path / "outside.png").write_bytes(b"secret")
    (files.root / "ab").mkdir(parents=True)
    for path in (file_path, f"{tmp_path}/outside.png"):
        with pytest.raises(NotFound):
            await files.read(path)
        assert await files.set_aside([path]) == []
    assert (tmp_path / "outside.png").exists()


async def test_no_link_leads_out_of_the_folder(files: ImageFiles, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(b"secret")
    files.root.mkdir()
    (files.root / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(NotFound):
        await files.read("link.png")
    assert await files.set_aside(["link.png"]) == []
    assert (tmp_path / "outside.png").exists()


async def test_a_file_that_is_set_aside_is_hidden_until_it_is_put_back_or_deleted(files: ImageFiles) -> None:
    saved = await files.save(DATA, "image/png")
    assert await files.set_aside([saved.file_path, "ab/nothing.png", "ab", ""]) == [saved.file_path]
    with pytest.raises(NotFound):
        await files.read(saved.file_path)
    await files.put_back([saved.file_path])
    assert await files.read(saved.file_path) == DATA
    await files.set_aside([saved.file_path])
    await files.delete_aside([saved.file_path])
    await files.put_back([saved.file_path])
    assert stored(files) == []


async def test_a_file_that_is_saved_again_survives_the_deletion(files: ImageFiles) -> None:
    saved = await files.save(DATA, "image/png")
    await files.set_aside([saved.file_path])
    await files.save(DATA, "image/png")
    await files.delete_aside([saved.file_path])
    assert stored(files) == [files.path(saved.file_path)]


def make_old(path: Path) -> None:
    os.utime(path, (1e9, 1e9))


async def test_old_files_are_found_and_traces_of_interrupted_work_cleared(files: ImageFiles) -> None:
    old, young, hidden = [(await files.save(data, "image/png")).file_path for data in (b"a", b"b", b"c")]
    await files.set_aside([hidden])
    half = files.root / "ab" / ".x1y2.tmp"
    others = [files.root / "ab" / "mine.png", files.root / "notes.aside", files.root / "ab" / ".mine.png.aside"]
    half.parent.mkdir(exist_ok=True)
    for path in (half, *others):
        path.write_bytes(b"x")
    for path in files.root.rglob("*"):
        if path != files.path(young) and path.is_file():
            make_old(path)
    assert await files.older_than(3600) == sorted([old, hidden])
    assert await files.read(hidden) == b"c"
    assert stored(files) == sorted([files.path(old), files.path(young), files.path(hidden), *others])
