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


def scan_bomb(scans: int = 2000) -> bytes:
    """A small progressive JPEG with its last scan repeated: each is decoded over the whole picture."""
    whole = _save(Pillow.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    body, end = whole[:-2], whole[-2:]
    return body + body[body.rindex(b"\xff\xda") :] * scans + end


def text_bomb() -> bytes:
    """A PNG whose compressed comment unfolds to 100 MB."""
    whole = encoded("PNG")
    after_header = 8 + 25
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000))
    return whole[:after_header] + comment + whole[after_header:]


def huge_jpeg() -> bytes:
    """A JPEG of a few bytes whose header promises 65,500 × 65,500 pixels."""
    whole = bytearray(encoded("JPEG"))
    at = whole.index(b"\xff\xc0")
    whole[at + 5 : at + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(whole)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _save(picture: Pillow.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()
