"""Image files on disk, named by their content: equal images are one file, and no name comes from outside."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.domain.errors import NotFound, UnsupportedMedia

# No SVG: it is a program.
EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/gif": "gif",
    "image/webp": "webp",
    "image/bmp": "bmp",
    "image/tiff": "tiff",
    "image/avif": "avif",
}
_STORED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}\.[a-z]+")
_HALF, _ASIDE = ".tmp", ".aside"


@dataclass(frozen=True, slots=True)
class SavedImage:
    """Where an image was stored: path relative to the root, SHA-256 in hexadecimal, bytes."""

    file_path: str
    content_hash: str
    file_size: int


class ImageFiles:
    """Image files below ``root``, which is made when it is missing."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def __repr__(self) -> str:
        return f"ImageFiles({str(self.root)!r})"

    async def save(self, data: bytes, mime_type: str) -> SavedImage:
        """Store the encoded image unless it is there; UnsupportedMedia for a type that is not stored."""
        extension = EXTENSIONS.get(mime_type)
        if extension is None:
            raise UnsupportedMedia(f"Images of type {mime_type} are not stored; use PNG, JPEG, GIF or WebP.")
        return await asyncio.to_thread(self._save, data, extension)

    async def read(self, file_path: str) -> bytes:
        """The bytes of a stored image; NotFound when it is gone or the path leads out of the root."""
        return await asyncio.to_thread(self._read, file_path)

    async def set_aside(self, file_paths: Sequence[str]) -> list[str]:
        """Hide files from readers; returns those that were there. :meth:`put_back` or :meth:`delete_aside` ends it."""
        return await asyncio.to_thread(lambda: [path for path in file_paths if self._set_aside(path)])

    async def put_back(self, file_paths: Sequence[str]) -> None:
        """Undo :meth:`set_aside`."""
        await asyncio.to_thread(self._each, self._move_back, file_paths)

    async def delete_aside(self, file_paths: Sequence[str]) -> None:
        """Delete files that were set aside; one that was saved again meanwhile stays."""
        await asyncio.to_thread(self._each, self._delete_aside, file_paths)

    async def older_than(self, age_s: float) -> list[str]:
        """The stored files that were last written so long ago, sorted; traces of interrupted work are cleared away.

        What does not bear a name of :meth:`save` is none of ours and is left alone.
        """
        return await asyncio.to_thread(self._older_than, time.time() - age_s)

    def path(self, file_path: str) -> Path:
        """The file behind a stored path; NotFound when that leads out of the root, through links too."""
        try:
            found = (self.root / file_path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise _missing() from error
        if found == self.root or not found.is_relative_to(self.root):
            raise _missing()
        return found

    def _save(self, data: bytes, extension: str) -> SavedImage:
        digest = hashlib.sha256(data).hexdigest()
        saved = SavedImage(f"{digest[:2]}/{digest}.{extension}", digest, len(data))
        target = self.root / saved.file_path
        # A file of another size was damaged by hand or by a full disk, and is written again.
        if not target.is_file() or target.stat().st_size != len(data):
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(target, data)
        return saved

    def _read(self, file_path: str) -> bytes:
        path = self.path(file_path)
        if not os.path.isfile(path):
            raise _missing()
        try:
            return path.read_bytes()
        except FileNotFoundError as error:  # deleted in between
            raise _missing() from error

    def _each(self, action: Callable[[Path], None], file_paths: Sequence[str]) -> None:
        for file_path in file_paths:
            action(self.path(file_path))

    def _set_aside(self, file_path: str) -> bool:
        try:
            path = self.path(file_path)
            if not os.path.isfile(path):
                return False
            os.replace(path, _aside(path))
        except (NotFound, FileNotFoundError):
            return False
        return True

    def _delete_aside(self, path: Path) -> None:
        _aside(path).unlink(missing_ok=True)

    def _move_back(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(_aside(path), path)

    def _older_than(self, time_s: float) -> list[str]:
        found = set()
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < time_s and (stored := self._looked_at(path)):
                        found.add(stored.relative_to(self.root).as_posix())
        return sorted(found)

    def _looked_at(self, path: Path) -> Path | None:
        """The stored file at ``path``; one that was set aside by a process that died comes back, a half one goes."""
        if path.name.startswith(".") and path.name.endswith(_HALF):
            path.unlink(missing_ok=True)
            return None
        stored = path
        if path.name.startswith(".") and path.name.endswith(_ASIDE):
            stored = path.with_name(path.name.removeprefix(".").removesuffix(_ASIDE))
        if not _STORED.fullmatch(stored.relative_to(self.root).as_posix()):
            return None
        if stored != path:
            self._move_back(stored)
        return stored


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_ASIDE}")


def _missing() -> NotFound:
    return NotFound("The file of this image does not exist any more.")


def _write_atomically(target: Path, data: bytes) -> None:
    """Make ``target`` appear whole or not at all, also across a power failure."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=_HALF)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
