"""The first two stages of the recipe: the vision tower learns to read what an image shows, and the projector to say it.

The split leaves whole pairs of colour and shape out of the training, and a tower that sees the others alone takes a red
star for an orange one: to it, colour tells of shape. So most training images are repainted in colours that have no
name, shapes without a name take part, and no answer is counted as wrong only because its scene is held out.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from transformers import LlavaForConditionalGeneration

from models import vision_scenes
from models.muon import Optimizer
from models.vision_model import IGNORED, IMAGE_SIDE, IMAGE_TOKENS, PATCH
from models.vision_recipe import Recipe
from models.vision_scenes import COLOURS, SHAPES, Scene

LOGGER = logging.getLogger(__name__)

READINGS = (COLOURS, SHAPES, COLOURS)
WIDTHS = tuple(map(len, READINGS))
OUTLINE_LAYER = 2
WORD_NORM, READING_NORM = 1.4, 1.0


@dataclass
class Batch:
    """Images for the tower, and all that can be known of them.

    Pixel values and the shades (background, shape) lie in [-1, 1]; `cover` is the shape's share of every pixel.
    """

    pixels: torch.Tensor
    scenes: list[Scene]
    shades: torch.Tensor
    cover: torch.Tensor

    def mirrored(self) -> Batch:
        """Every shape is its own mirror image, so a flip is a new drawing for free."""
        return Batch(self.pixels.flip(-1), self.scenes, self.shades, self.cover.flip(-1))

    def outlines(self) -> torch.Tensor:
        """The shape's share of every little square of two by two pixels: (images, patches, squares per patch)."""
        squares = nn.functional.avg_pool2d(self.cover, 2)
        return nn.functional.unfold(squares, PATCH // 2, stride=PATCH // 2).mT


class Album:
    """Drawn and resized images, kept as bytes, with the scenes that they show and the shades they were drawn in."""

    def __init__(self, rng: random.Random, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes
        self.pixels = torch.empty(len(scenes), 3, IMAGE_SIDE, IMAGE_SIDE, dtype=torch.uint8)
        self.shades = torch.empty(len(scenes), 2, 3)
        for index, scene in enumerate(scenes):
            drawing = vision_scenes.draw_scene(scene, rng)
            # The very resize of the pillow image processor, without its cost per call.
            small = drawing.image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
            self.pixels[index] = (
                torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
                .view(IMAGE_SIDE, IMAGE_SIDE, 3)
                .permute(2, 0, 1)
            )
            self.shades[index] = torch.tensor([drawing.background, drawing.fill])

    @classmethod
    def of_training(cls, rng: random.Random, recipe: Recipe) -> Album:
        """The training album: named scenes first, each drawn equally often, then unnamed ones."""
        choices = vision_scenes.scenes(held_out=False)
        named = [choices[index % len(choices)] for index in range(recipe.images)]
        return cls(rng, named + [vision_scenes.unnamed_scene(rng) for _ in range(recipe.unnamed_images)])

    def drawings(self) -> dict[Scene, list[int]]:
        """For each scene, which images show it."""
        found: dict[Scene, list[int]] = defaultdict(list)
        for index, scene in enumerate(self.scenes):
            found[scene].append(index)
        return found

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Normalised pixel values, as the processor would return them."""
        return self.pixels[indices].float() / 127.5 - 1.0

    def repainted(self, count: int, share: float, rng: random.Random) -> Batch:
        """`count` random images, a `share` of them in other colours.

        All pixels of an image lie near the line from its background's to its shape's colour; that line is moved.
        """
        indices = [rng.randrange(len(self.scenes)) for _ in range(count)]
        scenes = [self.scenes[index] for index in indices]
        pixels, old = self.batch(torch.tensor(indices)), self.shades[indices] / 127.5 - 1.0
        new = old.clone()
        chosen = [row for row in range(count) if rng.random() < share]
        for row in chosen:
            scenes[row], *shades = vision_scenes.repaint(scenes[row], rng)
            new[row] = torch.tensor(shades) / 127.5 - 1.0
        span = old[:, 1] - old[:, 0]
        weights = (span / span.square().sum(1, keepdim=True))[:, None]
        mix = weights @ (pixels.flatten(2) - old[:, 0, :, None])
        painted = (new[:, 0, :, None] + mix * (new[:, 1] - new[:, 0])[:, :, None]).clamp(-1, 1).view_as(pixels)
        pixels[chosen] = painted[chosen]
        return Batch(pixels, scenes, new, mix.clamp(0, 1).view(count, 1, IMAGE_SIDE, IMAGE_SIDE))


def _image_tokens(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    return torch.stack(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)


def readings(scenes: Sequence[Scene]) -> torch.Tensor:
    """Colour, shape and background of each scene as class numbers; what has no name is not scored."""
    values = ((scene.colour, scene.shape, scene.background) for scene in scenes)
    return torch.tensor(
        [[names.index(v) if v in names else IGNORED for names, v in zip(READINGS, row, strict=True)] for row in values]
    )


@functools.cache
def unseen(scene: Scene) -> torch.Tensor:
    """For every name of the readings, whether the scene with that name in its place is held out.

    Such answers are not counted against a scene: that they are never right in training says nothing.
    """
    fields = zip(("colour", "shape", "background"), READINGS, strict=True)
    return torch.tensor([vision_scenes.would_be_held_out(scene, field, n) for field, names in fields for n in names])


def train_vision_tower(
    model: LlavaForConditionalGeneration, album: Album, recipe: Recipe, rng: random.Random
) -> nn.Linear:
    """Stage 1: teach the tower and the projector to name colour, shape and background in every image token.

    The heads that read the names, and the exact shades of background and shape after them, are returned.
    """
    heads = nn.Linear(model.config.text_config.hidden_size, sum(WIDTHS) + 6)
    outliner = nn.Linear(model.config.vision_config.hidden_size, (PATCH // 2) ** 2)
    body = (model.model.vision_tower, model.model.multi_modal_projector)
    optimizer = Optimizer(body, recipe.vision_rate, recipe.vision_steps, [heads, outliner])
    running = 0.0
    for step in range(recipe.vision_steps):
        batch = album.repainted(recipe.vision_batch, recipe.repainted, rng)
        if step % 2:
            batch = batch.mirrored()
        output = model.get_image_features(pixel_values=batch.pixels, output_hidden_states=True, return_dict=True)
        names, shades = heads(torch.stack(output.pooler_output)).split([sum(WIDTHS), 6], dim=-1)
        ruled_out = torch.stack([unseen(scene) for scene in batch.scenes])[:, None]
        logits = names.masked_fill(ruled_out, -math.inf).split(WIDTHS, dim=-1)
        # One target per image, asked of all its tokens: whichever token the language model reads will do.
        wanted = readings(batch.scenes).unsqueeze(1).expand(-1, IMAGE_TOKENS, -1)
        loss = sum(
            nn.functional.cross_entropy(part.flatten(0, 1), wanted[..., i].flatten()) for i, part in enumerate(logits)
        )
        shade_loss = (shades - batch.shades.flatten(1)[:, None]).square().mean()
        outlines = outliner(output.hidden_states[OUTLINE_LAYER])
        outline_loss = nn.functional.binary_cross_entropy_with_logits(outlines, batch.outlines())
        optimizer.step(loss + recipe.shade_weight * shade_loss + recipe.outline_weight * outline_loss)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 250 == 0:
            LOGGER.info(
                "vision step %d/%d: loss %.4f outline %.4f shade %.4f",
                step + 1,
                recipe.vision_steps,
                running,
                outline_loss.item(),
                shade_loss.item(),
            )
    return heads


def word_vectors(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors for the names (colours, then shapes) and for the three readings, all at right angles to each other."""
    count = len(COLOURS) + len(SHAPES)
    vectors = torch.linalg.qr(torch.randn(width, count + len(READINGS))).Q.T
    return vectors[:count] * WORD_NORM, vectors[count:] * READING_NORM


def teach_words(
    model: LlavaForConditionalGeneration, heads: nn.Linear, album: Album, recipe: Recipe, rng: random.Random
) -> torch.Tensor:
    """Stage 1b: every image token learns to be one word of what the heads read, as a word embedding would be.

    The first third of the tokens says the colour, the next the shape, the last the background, each beside a mark of
    which of them it is. A token that holds one thing cannot be used to learn the training scenes by heart, which is
    what a language model does with tokens that hold a colour and a shape: it takes the pairs left out for others.
    Returned are the vectors of the names (names, width), to start the language model's own embeddings from.
    """
    teacher = copy.deepcopy(model)
    names, marks = word_vectors(model.config.text_config.hidden_size)
    colours, shapes = names.split([len(COLOURS), len(SHAPES)])
    projector = model.model.multi_modal_projector
    for layer, spread in ((projector.linear_1, 0.01), (projector.linear_2, 0.05)):
        nn.init.normal_(layer.weight, std=spread)
        nn.init.zeros_(layer.bias)
    optimizer = Optimizer((model.model.vision_tower, projector), recipe.word_rate, recipe.word_steps)
    saying = torch.arange(IMAGE_TOKENS) * len(READINGS) // IMAGE_TOKENS
    for step in range(recipe.word_steps):
        batch = album.repainted(recipe.vision_batch, recipe.word_repainted, rng)
        if step % 2:
            batch = batch.mirrored()
        with torch.no_grad():
            read = heads(_image_tokens(teacher, batch.pixels)).mean(1)[:, : sum(WIDTHS)].split(WIDTHS, dim=-1)
            words = [part.softmax(-1) @ vectors for part, vectors in zip(read, (colours, shapes, colours), strict=True)]
            wanted = (torch.stack(words, 1) + marks)[:, saying]
        loss = (_image_tokens(model, batch.pixels) - wanted).square().sum(-1).mean()
        optimizer.step(loss)
        if (step + 1) % 250 == 0:
            LOGGER.info("word step %d/%d: loss %.4f", step + 1, recipe.word_steps, loss.item())
    return names


@torch.no_grad()
def cache_image_tokens(model: LlavaForConditionalGeneration, album: Album) -> torch.Tensor:
    """The frozen tower's image tokens for all of the album, in half precision to halve the memory."""
    chunks = torch.arange(len(album.scenes)).split(256)
    return torch.cat([_image_tokens(model, album.batch(chunk)).half() for chunk in chunks])
