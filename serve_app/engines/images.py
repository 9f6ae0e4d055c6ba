"""Stored images as the picture objects that processors take."""

from __future__ import annotations

import io

from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from serve_app.domain.errors import InvalidInput, UnsupportedMedia
from serve_app.domain.generation import Image

MAX_PIXELS = 40_000_000
MAX_IMAGES = 32
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def open_image(image: Image) -> Pillow.Image:
    """The first frame in RGB, transparency over white. The pixels are only decoded when their number is allowed.

    Raises:
        UnsupportedMedia: it is no image of the known formats, is damaged, or has too many pixels.
    """
    try:
        with Pillow.open(io.BytesIO(image.data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UnsupportedMedia(
                    f"An image has {picture.width} × {picture.height} pixels; {MAX_PIXELS} is the most."
                )
            return _over_white(picture)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as fault:
        raise UnsupportedMedia("An image cannot be read. Send PNG, JPEG, WebP, GIF or BMP.") from fault


def _over_white(picture: Pillow.Image) -> Pillow.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", layer.size, "white"), layer).convert("RGB")


def check_count(number: int) -> None:
    """Refuse more images than a request may have."""
    if number > MAX_IMAGES:
        raise InvalidInput(f"The conversation holds {number} images; at most {MAX_IMAGES} can be shown to a model.")
