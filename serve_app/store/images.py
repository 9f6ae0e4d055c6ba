"""Image files on disk, named by their content: equal images are one file, and no name comes from outside."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
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

    async def delete(self, file_path: str) -> bool:
        """Delete a stored image; False when there was none, or the path leads out of the root."""
        return await asyncio.to_thread(self._delete, file_path)

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

    def _delete(self, file_path: str) -> bool:
        try:
            path = self.path(file_path)
        except NotFound:
            return False
        there = os.path.isfile(path)
        if there:
            path.unlink(missing_ok=True)
        return there


def _missing() -> NotFound:
    return NotFound("The file of this image does not exist any more.")


def _write_atomically(target: Path, data: bytes) -> None:
    """Make ``target`` appear whole or not at all, also across a power failure."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
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
