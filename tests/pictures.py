"""Images that tests upload: good ones, large ones, dangerous ones."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image as Pillow


def encoded(kind: str, size: tuple[int, int] = (3, 2), **options: Any) -> bytes:
    """A small image of one colour; ``kind`` as Pillow names it."""
    return _save(Pillow.new("RGB", size, "red"), kind, **options)


def photo(kind: str, **options: Any) -> bytes:
    """64 × 48 pixels of noise, which no format makes small."""
    noise = Pillow.effect_noise((64, 48), 80).convert("RGB")
    return _save(noise, kind, **options)


def animation() -> bytes:
    frames = [Pillow.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=50)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 900 million pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _save(picture: Pillow.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()
