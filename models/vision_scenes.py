"""The scenes that `tiny-vision` is trained and measured on, their held-out split, and how they are drawn.

Every image shows one shape on a plain background. What a picture *is* (its `Scene`: colour, shape, size class and
background) is separate from how it is drawn (image size, position, exact shade), because the held-out split is defined
on scenes: `is_held_out` is a pure function of a scene and of the constants in this file, so the split was fixed
before any training run, and neither the training nor the evaluation can move it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

# Each name covers a range of shades (low, high), so that the CSS shade, a pure shade and a JPEG-softened one all count.
COLOUR_RANGES: dict[str, tuple[RGB, RGB]] = {
    "red": ((195, 0, 0), (255, 45, 55)),
    "green": ((0, 118, 0), (65, 255, 75)),
    "blue": ((0, 0, 135), (65, 95, 255)),
    "yellow": ((235, 215, 0), (255, 255, 75)),
    "orange": ((235, 125, 0), (255, 170, 45)),
    "purple": ((110, 0, 120), (165, 60, 205)),
    "black": ((0, 0, 0), (35, 35, 35)),
    "white": ((228, 228, 228), (255, 255, 255)),
}
# What a caller who writes the plain name gets; half of the drawings use exactly these.
PURE_COLOURS: dict[str, RGB] = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
COLOURS: tuple[str, ...] = tuple(COLOUR_RANGES)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond")
# Off the list on purpose. Training shows such scenes too, and asks only for what has a name: of a shape in a colour
# without a name the shape, of a shape without a name the colour. Without them a model learns that the held-out pairs do
# not exist, and takes an unseen red star for an orange one.
UNNAMED = "unnamed"
UNNAMED_SHAPES: tuple[str, ...] = ("ring", "hexagon", "arrow", "half disc", "blob")
# Side of the shape's bounding box, as a fraction of the image's shorter side.
SIZE_RANGES: dict[str, tuple[float, float]] = {"small": (0.5, 0.62), "medium": (0.62, 0.78), "large": (0.78, 0.95)}
SIZES: tuple[str, ...] = tuple(SIZE_RANGES)

MIN_SIDE = 24
MAX_SIDE = 640
MAX_ASPECT = 2.0

# The split. Whole colour-shape pairs and whole size-background pairs are never trained on, one per shape and one per
# size, and neither is one in ten of the remaining scenes.
SPLIT_SEED = "tiny-vision-split-1"
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("white", "circle"),
        ("purple", "square"),
        ("green", "triangle"),
        ("red", "star"),
        ("blue", "cross"),
        ("yellow", "diamond"),
    }
)
HELD_OUT_STAGES: frozenset[tuple[str, str]] = frozenset({("small", "orange"), ("medium", "black"), ("large", "green")})
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Scene:
    """What one image shows, independent of how it is drawn."""

    colour: str
    shape: str
    size: str
    background: str


@functools.cache
def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the held-out split; the answer depends on this file's constants alone."""
    if (scene.colour, scene.shape) in HELD_OUT_PAIRS or (scene.size, scene.background) in HELD_OUT_STAGES:
        return True
    key = f"{SPLIT_SEED}/{scene.colour}/{scene.shape}/{scene.size}/{scene.background}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def would_be_held_out(scene: Scene, field: str, name: str) -> bool:
    """Whether a scene with another colour, shape, size or background (the `field`) is held out."""
    return is_held_out(replace(scene, **{field: name}))


@functools.cache
def scenes(held_out: bool) -> tuple[Scene, ...]:
    """Every scene of one side of the split, in a fixed order."""
    every = (
        Scene(colour, shape, size, background)
        for colour in COLOURS
        for shape in SHAPES
        for size in SIZES
        for background in COLOURS
        if background != colour
    )
    return tuple(scene for scene in every if is_held_out(scene) == held_out)


def has_name(value: str) -> bool:
    """Whether a colour or a shape is on the lists."""
    return value in COLOURS or value in SHAPES


def unnamed_scene(rng: random.Random) -> Scene:
    """A scene with a colour or a shape off the list, as many of the one as of the other; the split binds it too."""
    while True:
        background = rng.choice((*COLOURS, *[UNNAMED] * len(COLOURS)))
        if rng.random() < 0.5:
            scene = Scene(UNNAMED, rng.choice(SHAPES), rng.choice(SIZES), background)
        else:
            scene = Scene(rng.choice(COLOURS), rng.choice(UNNAMED_SHAPES), rng.choice(SIZES), background)
        if (scene.colour == UNNAMED or scene.colour != background) and not is_held_out(scene):
            return scene


def _has_name(shade: RGB) -> bool:
    """Whether a shade lies in, or within a hair of, the range of a named colour."""
    margin = 12
    return any(
        all(a - margin <= value <= b + margin for a, value, b in zip(low, shade, high, strict=True))
        for low, high in COLOUR_RANGES.values()
    )


def _shade(name: str, rng: random.Random) -> RGB:
    if name == UNNAMED:
        while _has_name(shade := (rng.randrange(256), rng.randrange(256), rng.randrange(256))):
            pass
        return shade
    if rng.random() < 0.5:
        return PURE_COLOURS[name]
    low, high = COLOUR_RANGES[name]
    red, green, blue = (rng.randint(a, b) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _image_size(rng: random.Random) -> tuple[int, int]:
    side = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_SIDE)))
    root = math.exp(rng.uniform(-0.5, 0.5) * math.log(MAX_ASPECT))
    width, height = (min(MAX_SIDE, max(MIN_SIDE, round(value))) for value in (side * root, side / root))
    return width, height


def _star(x: float, y: float, side: float, inner: float) -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius = side / 2 * (1.0 if corner % 2 == 0 else inner)
        angle = math.pi * (corner / 5 - 0.5)
        points.append((x + side / 2 + radius * math.cos(angle), y + side / 2 + radius * math.sin(angle)))
    return points


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[float, float, float], fill: RGB, vary: float) -> None:
    """Draw `shape` into the square `box` (left, top, side); `vary` in [0, 1] bends proportions without a norm."""
    x, y, side = box
    if shape == "circle":
        draw.ellipse((x, y, x + side, y + side), fill=fill)
    elif shape == "square":
        draw.rectangle((x, y, x + side, y + side), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x + side / 2, y), (x + side, y + side), (x, y + side)], fill=fill)
    elif shape == "star":
        draw.polygon(_star(x, y, side, 0.38 + 0.1 * vary), fill=fill)
    elif shape == "cross":
        arm = side * (0.28 + 0.12 * vary)
        start = (side - arm) / 2
        draw.rectangle((x + start, y, x + start + arm, y + side), fill=fill)
        draw.rectangle((x, y + start, x + side, y + start + arm), fill=fill)
    elif shape == "diamond":
        centre, half = x + side / 2, side / 2 * (1.0 - 0.25 * vary)
        draw.polygon(
            [(centre, y), (centre + half, y + side / 2), (centre, y + side), (centre - half, y + side / 2)], fill
        )
    else:
        _draw_unnamed_shape(draw, shape, box, fill, vary)


def _blob(x: float, y: float, side: float, vary: float) -> list[tuple[float, float]]:
    """A polygon of five to nine corners at uneven distances from the centre, all of it told by `vary`."""
    rng = random.Random(vary)
    corners, turn = rng.randint(5, 9), rng.random()
    points = []
    for corner in range(corners):
        radius, angle = side / 2 * rng.uniform(0.45, 1.0), 2 * math.pi * (corner + turn) / corners
        points.append((x + side / 2 + radius * math.cos(angle), y + side / 2 + radius * math.sin(angle)))
    return points


def _draw_unnamed_shape(
    draw: ImageDraw.ImageDraw, shape: str, box: tuple[float, float, float], fill: RGB, vary: float
) -> None:
    x, y, side = box
    if shape == "ring":
        draw.ellipse((x, y, x + side, y + side), outline=fill, width=max(2, round(side / 4)))
    elif shape == "half disc":
        draw.pieslice((x, y, x + side, y + side), 180, 360, fill=fill)
    elif shape == "hexagon":
        draw.regular_polygon((x + side / 2, y + side / 2, side / 2), 6, fill=fill)
    elif shape == "arrow":
        corners = ((0, 0.35), (0.5, 0.35), (0.5, 0.1), (1, 0.5), (0.5, 0.9), (0.5, 0.65), (0, 0.65))
        draw.polygon([(x + side * a, y + side * b) for a, b in corners], fill=fill)
    elif shape == "blob":
        draw.polygon(_blob(x, y, side, vary), fill=fill)
    else:
        raise ValueError(f"unknown shape: {shape!r}")


def _far_apart(first: RGB, second: RGB) -> bool:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) > 110


def _shades(scene: Scene, rng: random.Random) -> tuple[RGB, RGB]:
    """Shades of the background and of the shape; what has no name keeps clear of the other."""
    background, fill = _shade(scene.background, rng), _shade(scene.colour, rng)
    while UNNAMED in (scene.colour, scene.background) and not _far_apart(background, fill):
        background, fill = _shade(scene.background, rng), _shade(scene.colour, rng)
    return background, fill


@dataclass(frozen=True)
class Drawing:
    """An image of a scene and the exact shades that it was drawn with."""

    image: Image.Image
    background: RGB
    fill: RGB


def draw_scene(scene: Scene, rng: random.Random) -> Drawing:
    """Draw a scene at a random image size, position and shade; a quarter of all but the smallest went through JPEG."""
    width, height = _image_size(rng)
    side = rng.uniform(*SIZE_RANGES[scene.size]) * min(width, height)
    left, top = rng.uniform(0, width - 1 - side), rng.uniform(0, height - 1 - side)
    # Half of the images have smooth edges; large ones are smoothed by the processor's own downscale anyway.
    scale = 3 if max(width, height) < 200 and rng.random() < 0.5 else 1
    background, fill = _shades(scene, rng)
    image = Image.new("RGB", (width * scale, height * scale), background)
    box = (left * scale, top * scale, side * scale)
    _draw_shape(ImageDraw.Draw(image), scene.shape, box, fill, rng.random())
    if scale > 1:
        image = image.reduce(scale)
    if min(width, height) >= 64 and rng.random() < 0.25:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(60, 95))
        image = Image.open(buffer).convert("RGB")
    return Drawing(image, background, fill)


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """The image of a scene alone, drawn as `draw_scene` draws it."""
    return draw_scene(scene, rng).image


def repaint(scene: Scene, rng: random.Random) -> tuple[Scene, RGB, RGB]:
    """Other colours for a drawn scene, and their shades for background and shape.

    A shape with a name gets a colour without one, so that the repainted scene is never one of the held-out ones, and
    what a shape looks like is learnt apart from its colour; a shape without a name gets any colour. The split of sizes
    and backgrounds binds all the same.
    """
    while True:
        colour = rng.choice(COLOURS) if not has_name(scene.shape) and rng.random() < 0.75 else UNNAMED
        background = rng.choice(COLOURS) if rng.random() < 0.5 else UNNAMED
        other = Scene(colour, scene.shape, scene.size, background)
        if (colour == UNNAMED or colour != background) and not is_held_out(other):
            return (other, *_shades(other, rng))
