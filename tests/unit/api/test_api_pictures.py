"""Uploaded images are judged by content and come out clean."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image as Pillow
from PIL import ImageChops, PngImagePlugin

from serve_app.api.pictures import Limits, clean, safe_filename
from serve_app.domain.errors import InvalidInput, PayloadTooLarge, RotundaError, UnsupportedMedia
from tests.pictures import animation, bomb, encoded, huge_jpeg, photo, scan_bomb, text_bomb

LIMITS = Limits(1_000_000, 10_000, ("image/png", "image/jpeg", "image/webp", "image/gif"), 4)
SECRET = "TOP SECRET"


def cleaned(data: bytes, name: str = "picture") -> Pillow.Image:
    picture = Pillow.open(io.BytesIO(clean(data, name, LIMITS).data))
    picture.load()
    return picture


def saved(picture: Pillow.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def two_halves() -> Pillow.Image:
    """Red on the left, blue on the right."""
    picture = Pillow.new("RGB", (32, 16), "red")
    picture.paste("blue", (16, 0, 32, 16))
    return picture


def with_secret_exif(orientation: int = 1) -> Pillow.Exif:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = SECRET
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 0.0)}
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_photo_comes_out_upright_and_without_exif(kind: str) -> None:
    data = saved(two_halves(), kind, exif=with_secret_exif(orientation=6))
    assert SECRET.encode() in data
    result = clean(data, "photo", LIMITS)
    upright = Pillow.open(io.BytesIO(result.data))
    assert upright.size == (16, 32)
    top, bottom = upright.convert("RGB").getpixel((8, 4)), upright.convert("RGB").getpixel((8, 28))
    assert isinstance(top, tuple) and isinstance(bottom, tuple)
    assert top[0] > 200 and bottom[2] > 200
    assert SECRET.encode() not in result.data
    assert not dict(upright.getexif())


@pytest.mark.parametrize(
    "data",
    [
        saved(two_halves(), "JPEG", comment=SECRET.encode()),
        saved(two_halves(), "GIF", comment=SECRET.encode()),
        saved(two_halves(), "WEBP", xmp=SECRET.encode()),
        encoded("PNG") + b"<script>" + SECRET.encode(),
        encoded("JPEG") + SECRET.encode(),
    ],
    ids=["JPEG comment", "GIF comment", "WebP XMP", "PNG trailer", "JPEG trailer"],
)
def test_nothing_but_the_picture_survives(data: bytes) -> None:
    assert SECRET.encode() in data
    assert SECRET.encode() not in clean(data, "picture", LIMITS).data


def test_text_chunks_of_a_png_are_left_out() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", SECRET)
    data = saved(two_halves(), "PNG", pnginfo=info)
    assert SECRET.encode() not in clean(data, "picture", LIMITS).data


def test_a_jpeg_keeps_its_quality() -> None:
    data = photo("JPEG", quality=97, subsampling=0)
    before, after = Pillow.open(io.BytesIO(data)), cleaned(data)
    assert getattr(after, "quantization") == getattr(before, "quantization")  # noqa: B009 - not on the base class
    difference = ImageChops.difference(before.convert("RGB"), after.convert("RGB"))
    assert max(high for _, high in difference.getextrema()) <= 4  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_keeps_its_pixels(mode: str) -> None:
    picture = Pillow.effect_noise((20, 10), 90).convert("RGBA" if mode == "P" else "L").convert(mode)
    after = cleaned(saved(picture, "PNG"))
    assert after.size == picture.size
    assert after.convert("RGBA").tobytes() == Pillow.open(io.BytesIO(saved(picture, "PNG"))).convert("RGBA").tobytes()


def test_transparency_of_a_palette_survives() -> None:
    picture = Pillow.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        after = cleaned(saved(picture, kind, transparency=0)).convert("RGBA")
        assert after.getpixel((0, 0))[3] == 0 and after.getpixel((3, 3)) == (255, 0, 0, 255)  # type: ignore[index]


def test_a_cmyk_jpeg_becomes_one_that_everybody_can_show() -> None:
    assert cleaned(saved(two_halves().convert("CMYK"), "JPEG")).mode == "RGB"


def test_a_jpeg_with_several_pictures_is_one_jpeg() -> None:
    data = saved(two_halves(), "MPO", save_all=True, append_images=[two_halves()])
    result = clean(data, "picture", LIMITS)
    assert (result.media_type, result.warnings) == ("image/jpeg", ())
    assert len(result.data) < len(data)


@pytest.mark.parametrize(
    "data",
    [
        animation(),
        saved(two_halves(), "PNG", save_all=True, append_images=[Pillow.new("RGB", (32, 16), "green")]),
        saved(two_halves(), "WEBP", save_all=True, append_images=[Pillow.new("RGB", (32, 16), "green")]),
    ],
    ids=["GIF", "APNG", "WebP"],
)
def test_an_animation_is_reduced_to_its_first_frame_and_says_so(data: bytes) -> None:
    result = clean(data, "wave", LIMITS)
    assert result.warnings == ("wave is animated; only its first frame is used.",)
    frame = Pillow.open(io.BytesIO(result.data))
    assert getattr(frame, "n_frames", 1) == 1
    first = frame.convert("RGB").getpixel((0, 0))
    assert isinstance(first, tuple) and first[0] > 200 and first[1] < 60


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", UnsupportedMedia),
        (b"GIF89a", RotundaError),
        (b"\x89PNG\r\n\x1a\n", RotundaError),
        (b"\xff\xd8\xff", RotundaError),
        (b"RIFF\x00\x00\x00\x00WEBP", RotundaError),
        (encoded("PNG")[:40], InvalidInput),
        (photo("WEBP")[:-100], InvalidInput),
        (encoded("BMP"), UnsupportedMedia),
        (bomb(), PayloadTooLarge),
        (huge_jpeg(), PayloadTooLarge),
        (scan_bomb(), InvalidInput),
        (text_bomb(), InvalidInput),
        (encoded("PNG", (200, 51)), PayloadTooLarge),
        (b"\0" * 1_000_001, PayloadTooLarge),
    ],
)
def test_refusals(data: bytes, error: type[RotundaError]) -> None:
    with pytest.raises(error) as caught:
        clean(data, "picture", LIMITS)
    assert caught.value.status < 500


def test_a_progressive_jpeg_is_taken() -> None:
    assert clean(photo("JPEG", progressive=True), "picture", LIMITS).media_type == "image/jpeg"


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: object) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    picture = Pillow.open(io.BytesIO(clean(encoded("JPEG", (32, 16), exif=exif), "picture", LIMITS).data))
    assert picture.size == (32, 16) and not picture.getexif()


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 200])
def test_broken_exif_costs_no_picture(exif: bytes) -> None:
    result = clean(encoded("JPEG", (32, 16), exif=exif), "picture", LIMITS)
    assert not Pillow.open(io.BytesIO(result.data)).getexif()


def test_every_cut_of_a_good_file_is_refused_or_fine_but_never_a_fault() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = photo(kind)
        for length in range(0, len(data), 37):
            try:
                clean(data[:length], "picture", LIMITS)
            except RotundaError as error:
                assert error.status in (415, 422)


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("photo.png", "photo.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\photo.png", "photo.png"),
        ("a\r\nb\0.png", "ab.png"),
        ("", "image"),
        ("..", "image"),
        ("x" * 300 + ".png", "x" * 196 + ".png"),
    ],
)
def test_names_are_for_people_only(given: str, safe: str) -> None:
    assert safe_filename(given) == safe
