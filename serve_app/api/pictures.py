"""One uploaded image, judged and cleaned: pure functions over bytes, run in a worker thread.

What comes out was decoded and encoded anew: upright, one frame, without metadata, and without whatever else the file
carried. JPEGs keep their own quantisation, so nothing visible is lost.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from PIL import GifImagePlugin, ImageOps, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin
from PIL import Image as Pillow
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from serve_app.domain.errors import InvalidInput, PayloadTooLarge, UnsupportedMedia

# Importing a plugin registers its format; a JPEG with several pictures calls itself MPO when it is open.
TYPES = {
    PngImagePlugin.PngImageFile.format: "image/png",
    JpegImageFile.format: "image/jpeg",
    WebPImagePlugin.WebPImageFile.format: "image/webp",
    GifImagePlugin.GifImageFile.format: "image/gif",
}
# What Pillow's decoders raise for damaged files, beside OSError.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, struct.error, zlib.error)
_QUALITY = 92
# Each scan of a JPEG is decoded over the whole picture, and a few bytes suffice for one. Progressive ones have some 10.
_MOST_SCANS = 50
_SCAN = b"\xff\xda"


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_bytes`` of one file, ``max_pixels`` of one picture, ``types`` that are taken, and ``per_message``."""

    max_bytes: int
    max_pixels: int
    types: tuple[str, ...]
    per_message: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A cleaned image: its type and encoded bytes, its name for people, and what was done to it."""

    media_type: str
    data: bytes
    filename: str
    warnings: tuple[str, ...] = ()


def clean(data: bytes, filename: str, limits: Limits) -> Picture:
    """Verify an uploaded file by its content; its name and declared type say nothing.

    Raises:
        PayloadTooLarge: too many bytes, or too many pixels (judged by the header, before anything is decoded).
        UnsupportedMedia: not an image of an accepted type.
        InvalidInput: an image of such a type, but damaged, or made to take very long.
    """
    name = safe_filename(filename)
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(
            f"{name} has {len(data) / 1e6:.1f} MB; an image may have {limits.max_bytes / 1e6:g} MB at most."
        )
    picture = _open(data, name, limits)
    media_type = "image/jpeg" if isinstance(picture, JpegImageFile) else TYPES[str(picture.format)]
    if media_type == "image/jpeg" and data.count(_SCAN) > _MOST_SCANS:
        raise InvalidInput(f"{name} is a JPEG of more than {_MOST_SCANS} scans. Save it again as an ordinary one.")
    warnings = []
    if media_type != "image/jpeg" and getattr(picture, "is_animated", False):
        warnings.append(f"{name} is animated; only its first frame is used.")
    try:
        encoded = _encode_anew(picture, media_type)
    except Pillow.DecompressionBombError as error:
        raise _too_many_pixels(name, limits) from error
    except _DAMAGE as error:
        raise InvalidInput(f"{name} is damaged: it cannot be decoded. Send it again, whole.") from error
    return Picture(media_type, encoded, name, tuple(warnings))


def safe_filename(filename: str) -> str:
    """A name to show and to save under: no path, no control characters, at most 200 characters."""
    last = re.split(r"[/\\]", filename)[-1]
    printable = "".join(character for character in last if character.isprintable()).strip(" .")
    return printable[-200:] or "image"


def _open(data: bytes, name: str, limits: Limits) -> Pillow.Image:
    accepted = ", ".join(kind.removeprefix("image/") for kind in limits.types)
    formats = [kind for kind, media_type in TYPES.items() if media_type in limits.types]
    try:
        picture = Pillow.open(io.BytesIO(data), formats=formats)
    except Pillow.DecompressionBombError as error:
        raise _too_many_pixels(name, limits) from error
    except UnidentifiedImageError as error:
        raise UnsupportedMedia(
            f"{name} is not an image of a type that is accepted ({accepted}), whatever its name says."
        ) from error
    except _DAMAGE as error:
        raise InvalidInput(f"{name} is damaged: it cannot be read. Send it again, whole.") from error
    if picture.width * picture.height > limits.max_pixels:
        raise _too_many_pixels(name, limits)
    return picture


def _too_many_pixels(name: str, limits: Limits) -> PayloadTooLarge:
    side = math.isqrt(limits.max_pixels)
    return PayloadTooLarge(
        f"{name} has too many pixels; {limits.max_pixels:,} is the most ({side} × {side} for instance)."
    )


def _encode_anew(picture: Pillow.Image, media_type: str) -> bytes:
    options = _options(picture, media_type)
    profile = picture.info.get("icc_profile")
    transparency = picture.info.get("transparency")
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if media_type == "image/jpeg" and upright.mode not in ("L", "RGB"):
        upright = upright.convert("RGB")
        options = {"quality": _QUALITY}
        profile = None  # it describes the colours before the conversion
    # Encoders copy what stands in `info` (comments, text chunks): keep only what the pixels mean.
    upright.info = {} if transparency is None else {"transparency": transparency}
    if profile and media_type != "image/gif":
        options["icc_profile"] = profile
    out = io.BytesIO()
    upright.save(out, media_type.removeprefix("image/").upper(), **options)
    return out.getvalue()


def _options(picture: Pillow.Image, media_type: str) -> dict[str, Any]:
    """How to encode without losing what the original kept. JPEG: with its own tables."""
    if isinstance(picture, JpegImageFile):
        sampling = get_sampling(picture)
        kept: dict[str, Any] = {"qtables": picture.quantization}
        return kept if sampling < 0 else {**kept, "subsampling": sampling}
    if media_type == "image/webp":
        return {"quality": _QUALITY, "method": 2}
    return {"save_all": False} if media_type == "image/gif" else {}
