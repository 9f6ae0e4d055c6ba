"""Train `tiny-vision`, a LLaVA of 0.9 M parameters that tells shapes and colours, and write its folder.

The recipe has three stages, all on CPU and seeded (`vision_tower.py` has two of them, `vision_language.py` the last).
"""

from __future__ import annotations

import logging
import pathlib
import random
import time

import torch

from models import vision_data
from models.vision_data import Author
from models.vision_eval import HISTORY_PROMPTS, HISTORY_TOKENS, PROMPTS, evaluate
from models.vision_language import Encoder, name_embeddings, train_language_model
from models.vision_model import CONTEXT, IMAGE, IMAGE_SIDE, IMAGE_TOKENS, build_model, build_processor, build_tokenizer
from models.vision_recipe import Recipe
from models.vision_scenes import COLOURS, SHAPES
from models.vision_tower import Album, cache_image_tokens, teach_words, train_vision_tower

LOGGER = logging.getLogger(__name__)

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
language:
- en
tags:
- llava
- tiny
---

# tiny-vision

A LLaVA of {parameters} parameters (float32), small enough to live in a source tree and to answer in milliseconds on
one CPU core, and trained, so that a test of an inference stack can check *what* was answered. It names the colour
(one of {colours}), the shape (one of {shapes}) and the background colour of an image that shows one shape on a plain
background; it tells two images of one message apart; and it answers follow-up questions about an image of an earlier
turn. Asked about an image when there is none, it says "{no_image}"; to anything else it says "{unknown}". It is a test
fixture and knows nothing else about the world.

## Use

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(path, local_files_only=True)
model = AutoModelForImageTextToText.from_pretrained(path, use_safetensors=True, local_files_only=True)
messages = [
    {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What colour is the shape?"}}]}}
]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.open("shape.png").convert("RGB")], return_tensors="pt")
output = model.generate(**inputs)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))  # The shape is red.
```

Pillow alone is enough; torchvision is not needed. Images of any size and aspect ratio are squashed to
{side} x {side} pixels and become {image_tokens} tokens. The template numbers the images of a message ("Image 1: ...").
Text must not contain the literal `{image}`: as with every LLaVA, the processor reads it as a place for an image.

## Measured accuracy

Greedy decoding, exact match of the whole reply, {prompts} prompts per skill, on scenes that training never draws: whole
colour-shape pairs, whole size-background pairs and one in ten of the other scenes are held out by a fixed rule
(`models/vision_scenes.py`). "Behind a history" puts the same kind of prompt behind at least {history_tokens:,} tokens
of other turns, other images among them ({history_prompts} prompts per skill).

| Skill | Alone | Behind a history |
|---|---|---|
{table}

## Recipe

`python models/train.py vision --seed {seed}` trains it from nothing in three stages. First the vision tower (SigLIP,
4 layers) learns to read colour, shape and background, mostly on images repainted in colours that have no name, so that
no shape is told by its colour. Then tower and projector learn to say it: a third of the image tokens become the word
for the colour, a third that for the shape, a third that for the background. Last the language model (Llama, 4 layers),
its embeddings of those words set to the same vectors, learns to answer over the frozen image tokens, in conversations
of up to {context:,} tokens. Measured process CPU time
of the committed weights' training, drawing the images included: {minutes:.1f} minutes on one thread of an x86-64 server core.

All of its data is generated: it holds nobody's text and nobody's image.
"""  # noqa: E501 - the card's lines, as they are written


def train(out: pathlib.Path, seed: int, recipe: Recipe | None = None) -> dict[str, float]:
    """Train `tiny-vision` from nothing, write its folder with the measured model card, and return what was measured."""
    recipe = recipe or Recipe()
    started = time.process_time()
    processor = build_processor(build_tokenizer(Author(random.Random(f"{seed}/tokenizer"), held_out=False)))
    # Each stage has random streams of its own, so that a change to one leaves the others as they were.
    torch.manual_seed(seed)
    model = build_model(processor.tokenizer)
    album = Album.of_training(random.Random(f"{seed}/album"), recipe)
    LOGGER.info("drew %d images: CPU %.0f s", len(album.scenes), time.process_time() - started)
    heads = train_vision_tower(model, album, recipe, random.Random(f"{seed}/paint"))
    words = teach_words(model, heads, album, recipe, random.Random(f"{seed}/words"))
    LOGGER.info("vision tower done: CPU %.0f s", time.process_time() - started)
    cache = cache_image_tokens(model, album)
    torch.manual_seed(seed + 1)
    name_embeddings(model, processor.tokenizer, words)
    unnamed = album.scenes[recipe.images :]
    author = Author(random.Random(f"{seed}/language"), held_out=False, unnamed=unnamed)
    encode = Encoder(processor, album.drawings(), author.rng)
    train_language_model(model, cache, encode, author, recipe)
    seconds = time.process_time() - started
    LOGGER.info("training done: CPU %.0f s", seconds)
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)
    scores = evaluate(out)
    write_card(out, model.num_parameters(), seconds, seed, scores)
    return scores


def write_card(folder: pathlib.Path, parameters: int, seconds: float, seed: int, scores: dict[str, float]) -> None:
    """Write the model card, with the accuracy as measured on the weights in `folder`."""
    rows = (
        f"| {skill.replace('_', ' ')} | {scores[skill]:.1%} | {scores[f'{skill}_behind_history']:.1%} |"
        for skill in vision_data.SKILLS
    )
    card = CARD.format(
        parameters=f"{parameters:,}",
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        no_image=vision_data.NO_IMAGE,
        unknown=vision_data.UNKNOWN,
        side=IMAGE_SIDE,
        image_tokens=IMAGE_TOKENS,
        image=IMAGE,
        prompts=PROMPTS,
        history_prompts=HISTORY_PROMPTS,
        history_tokens=HISTORY_TOKENS,
        table="\n".join(rows),
        seed=seed,
        context=CONTEXT,
        minutes=seconds / 60,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
