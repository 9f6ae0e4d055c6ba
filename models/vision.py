"""Train and evaluate `tiny-vision`, a LLaVA of 0.9 M parameters that tells shapes and colours.

The recipe has two stages, both on CPU and seeded:

1. The vision tower and the projector learn to put colour, shape and background into every image token, through
   linear heads that are dropped afterwards.
2. The language model learns to answer in conversations over the frozen, cached image tokens: short ones first, then
   ones that fill most of the context, so that answers stay right behind a long history.
"""

from __future__ import annotations

import logging
import math
import pathlib
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from models import vision_data
from models.vision_data import Author, Conversation, Scene, Turn

LOGGER = logging.getLogger(__name__)

IMAGE_SIDE = 48
PATCH = 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
VOCABULARY = 512
CONTEXT = 2048
START, END, END_OF_TEXT, PAD, IMAGE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>", "<image>"
IMAGE_TOKEN_RMS = 0.15
IGNORED = -100
THINGS = (*vision_data.COLOURS, *vision_data.SHAPES)
PROMPTS, HISTORY_PROMPTS, HISTORY_TOKENS = 300, 300, 1_500

# Images are numbered within their message: without the number, two runs of image tokens differ only by position.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- elif message['content'] %}
        {%- set images = namespace(seen=0) %}
        {%- for part in message['content'] %}
            {%- if not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {%- if part['type'] in ('image', 'image_url') %}
                {%- set images.seen = images.seen + 1 %}
                {{- 'Image ' ~ images.seen ~ ': <image>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- else %}
                {{- raise_exception('unsupported content part: ' ~ part['type']) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


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
(`models/vision_data.py`). "Behind a history" puts the same kind of prompt behind at least {history_tokens:,} tokens
of other turns, other images among them ({history_prompts} prompts per skill).

| Skill | Alone | Behind a history |
|---|---|---|
{table}

## Recipe

`python models/train.py vision --seed {seed}` trains it from nothing in two stages: the vision tower (SigLIP, 4 layers)
and the projector learn to put colour, shape and background into every image token; then the language model (Llama,
4 layers, trained on contexts of up to about 1,000 tokens) learns to answer over the frozen image tokens. Measured
process CPU time of the committed weights' training, drawing the images included: {minutes:.1f} minutes on one thread
of an x86-64 server core.

All of its data is generated: it holds nobody's text and nobody's image.
"""


@dataclass(frozen=True)
class Phase:
    """A part of the language stage: steps, tokens per step, turns per conversation, and the share of drills."""

    steps: int
    tokens: int
    turns: tuple[int, int]
    drills: float


@dataclass(frozen=True)
class Recipe:
    """How much to train; the defaults are what the committed weights were trained with."""

    images: int = 60_000
    unnamed_images: int = 100_000
    cached_images: int = 90_000
    vision_steps: int = 11_000
    vision_batch: int = 32
    vision_rate: float = 3e-3
    language_rate: float = 3e-3
    probe_weight: float = 0.3
    # The rate falls along a cosine over all phases, so the long one must not come so late that nothing is left of it.
    phases: tuple[Phase, ...] = (
        Phase(steps=900, tokens=2_048, turns=(1, 2), drills=0.9),
        Phase(steps=700, tokens=2_048, turns=(1, 6), drills=0.3),
        Phase(steps=700, tokens=4_096, turns=(2, 26), drills=0.1),
    )


def build_tokenizer(author: Author) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on the text of generated conversations; digits stay single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END, PAD, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(author), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[END_OF_TEXT, START, IMAGE],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_texts(author: Author) -> Iterator[str]:
    for _ in range(4_000):
        for turn in author.chat(3).turns:
            yield f"user\nImage 1: \n{turn.text}"
            yield f"assistant\n{turn.answer}"
        yield f"system\n{author.system() or ''}"


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: images of any size are squashed to one small square, so no aspect ratio is cropped."""
    square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    image_processor = LlavaImageProcessorPil(
        size=square,
        crop_size=square,
        do_center_crop=False,
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model: a SigLIP tower without its pooling head, and a Llama with tied embeddings."""
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in (END, END_OF_TEXT, PAD, IMAGE)}
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=special[END],
        pad_token_id=special[PAD],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=special[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=[special[END], special[END_OF_TEXT]],
        pad_token_id=special[PAD],
    )
    return model


class Album:
    """Drawn and resized images, kept as bytes, and the scenes that they show."""

    def __init__(self, rng: random.Random, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes
        self.pixels = torch.empty(len(scenes), 3, IMAGE_SIDE, IMAGE_SIDE, dtype=torch.uint8)
        for index, scene in enumerate(scenes):
            image = vision_data.render(scene, rng)
            # The very resize of the pillow image processor, without its cost per call.
            small = image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
            self.pixels[index] = (
                torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
                .view(IMAGE_SIDE, IMAGE_SIDE, 3)
                .permute(2, 0, 1)
            )

    @classmethod
    def of_training(cls, rng: random.Random, recipe: Recipe) -> Album:
        """The training album: named scenes first, each drawn equally often, then unnamed ones."""
        choices = vision_data.scenes(held_out=False)
        named = [choices[index % len(choices)] for index in range(recipe.images)]
        return cls(rng, named + [vision_data.unnamed_scene(rng) for _ in range(recipe.unnamed_images)])

    def drawings(self, count: int) -> dict[Scene, list[int]]:
        """For each scene, which of the first `count` images show it."""
        found: dict[Scene, list[int]] = defaultdict(list)
        for index, scene in enumerate(self.scenes[:count]):
            found[scene].append(index)
        return found

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Normalised pixel values, as the processor would return them."""
        return self.pixels[indices].float() / 127.5 - 1.0


class Optimizer:
    """Muon for the matrices inside the layers and AdamW for all other parameters, on one schedule.

    Muon sees the first shapes after about half as many images as AdamW alone, which is most of this recipe's cost.
    """

    def __init__(self, body: Sequence[nn.Module], rate: float, steps: int, heads: Sequence[nn.Module] = ()) -> None:
        layers = [layer for part in body for layer in part.modules() if isinstance(layer, nn.Linear)]
        matrices = [layer.weight for layer in layers]
        known = {id(weight) for weight in matrices}
        self._parameters = [weight for part in (*body, *heads) for weight in part.parameters()]
        others = [weight for weight in self._parameters if id(weight) not in known]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.02),
        ]
        warmup = max(1, min(100, steps // 10))

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in self._optimizers]

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient of `loss` by one step."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for stage in (*self._optimizers, *self._schedules):
            stage.step()


def _image_tokens(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    return torch.stack(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)


def train_vision_tower(model: LlavaForConditionalGeneration, album: Album, recipe: Recipe) -> None:
    """Stage 1: teach the tower and the projector to name colour, shape and background in every image token."""
    names = (vision_data.COLOURS, vision_data.SHAPES, vision_data.COLOURS)
    values = [(scene.colour, scene.shape, scene.background) for scene in album.scenes]
    # What has no name is not scored.
    targets = torch.tensor(
        [[group.index(v) if v in group else IGNORED for group, v in zip(names, row, strict=True)] for row in values]
    )
    heads = nn.Linear(model.config.text_config.hidden_size, sum(map(len, names)))
    body = (model.model.vision_tower, model.model.multi_modal_projector)
    optimizer = Optimizer(body, recipe.vision_rate, recipe.vision_steps, [heads])
    running = 0.0
    for step in range(recipe.vision_steps):
        indices = torch.randint(len(album.scenes), (recipe.vision_batch,))
        pixels = album.batch(indices)
        if step % 2:  # every shape is its own mirror image, so a flip is a new drawing for free
            pixels = pixels.flip(-1)
        logits = heads(_image_tokens(model, pixels)).split([len(group) for group in names], dim=-1)
        # One target per image, asked of all its tokens: whichever token the language model reads will do.
        wanted = targets[indices].unsqueeze(1).expand(-1, IMAGE_TOKENS, -1)
        loss = sum(
            nn.functional.cross_entropy(part.flatten(0, 1), wanted[..., i].flatten()) for i, part in enumerate(logits)
        )
        optimizer.step(loss)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 250 == 0:
            LOGGER.info("vision step %d/%d: loss %.4f", step + 1, recipe.vision_steps, running)


@torch.no_grad()
def scale_image_tokens(model: LlavaForConditionalGeneration, album: Album) -> None:
    """Bring the image tokens to the scale of word embeddings.

    The dropped heads left them some forty times larger, and what attention adds to a token that large (such as which
    image of the message it belongs to) is lost in the next normalisation.
    """
    tokens = _image_tokens(model, album.batch(torch.arange(min(512, len(album.scenes)))))
    scale = IMAGE_TOKEN_RMS / tokens.square().mean().sqrt()
    projection = model.model.multi_modal_projector.linear_2
    projection.weight.mul_(scale)
    projection.bias.mul_(scale)


@torch.no_grad()
def cache_image_tokens(model: LlavaForConditionalGeneration, album: Album, count: int) -> torch.Tensor:
    """The frozen tower's image tokens for the album's first `count` images, in half precision to halve the memory."""
    chunks = torch.arange(count).split(256)
    return torch.cat([_image_tokens(model, album.batch(chunk)).half() for chunk in chunks])


@dataclass
class Example:
    """One encoded conversation, and the album's images in order.

    Beside the ids, for every token: its label if an answer that is trained on holds it; for image tokens, the image's
    place in its message; and along an answer about one of two images, the place or the thing that was asked for.
    """

    ids: list[int]
    labels: list[int]
    places: list[int]
    asked: list[int]
    things: list[int]
    images: list[int]


class Encoder:
    """Turns conversations into examples through the same template and tokenizer that serving uses."""

    def __init__(self, processor: LlavaProcessor, drawings: dict[Scene, list[int]], rng: random.Random) -> None:
        self.processor, self.tokenizer, self.drawings, self.rng = processor, processor.tokenizer, drawings, rng
        self.header = self.tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
        self.end, self.image = self.tokenizer.convert_tokens_to_ids([END, IMAGE])

    def __call__(self, conversation: Conversation) -> Example:
        """Encode one conversation, with a random drawing for each of its scenes."""
        text = self.processor.apply_chat_template(conversation.messages(), tokenize=False)
        ids = self.tokenizer.encode(text.replace(IMAGE, IMAGE * IMAGE_TOKENS), add_special_tokens=False)
        images = [self.rng.choice(self.drawings[scene]) for scene in conversation.images()]
        labels, asked, things = self._answers(ids, conversation.turns)
        order = iter(
            place for turn in conversation.turns for place in range(len(turn.images)) for _ in range(IMAGE_TOKENS)
        )
        places = [next(order) if token == self.image else IGNORED for token in ids]
        return Example(ids, labels, places, asked, things, images)

    def _answers(self, ids: list[int], turns: Sequence[Turn]) -> tuple[list[int], list[int], list[int]]:
        labels, asked, things = ([IGNORED] * len(ids) for _ in range(3))
        position = 0
        for turn in turns:
            while ids[position : position + len(self.header)] != self.header:
                position += 1
            position += len(self.header)
            stop = ids.index(self.end, position) + 1
            # From the last token of the prompt up to the one that predicts the end.
            span = slice(position - 1, stop - 1)
            if turn.trained:
                labels[position:stop] = ids[position:stop]
            if turn.asked is not None:
                asked[span] = [turn.asked] * (stop - position)
            if turn.thing is not None:
                things[span] = [THINGS.index(turn.thing)] * (stop - position)
        return labels, asked, things


def batches(encode: Encoder, author: Author, phase: Phase) -> Iterator[list[Example]]:
    """A phase's batches of about `phase.tokens` tokens, grouped by length so that little of a batch is padding."""

    def example() -> Example:
        drill = author.rng.random() < phase.drills
        return encode(author.drill() if drill else author.chat(author.rng.randint(*phase.turns)))

    made = 0
    while True:
        pool = sorted((example() for _ in range(256)), key=lambda e: len(e.ids))
        groups: list[list[Example]] = [[]]
        for item in pool:
            if len(item.ids) > CONTEXT:
                continue
            if groups[-1] and len(item.ids) * (len(groups[-1]) + 1) > phase.tokens:
                groups.append([])
            groups[-1].append(item)
        author.rng.shuffle(groups)
        for group in groups:
            if made == phase.steps:
                return
            made += 1
            yield group


class Probes(nn.Module):
    """Linear readers of the language model's lower layers, dropped after training.

    Telling two images apart takes two facts: which place an image token has, and which place or thing a question asks
    for. Neither is worth learning before the other, and answers alone leave the model guessing for thousands of steps;
    so the output of the first layer is asked for the one and that of the second for the other.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place, self.asked, self.thing = nn.Linear(width, 2), nn.Linear(width, 2), nn.Linear(width, len(THINGS))

    def forward(self, layers: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss of all readers, given the outputs of all layers and the places, asked places and things."""
        loss = layers[0].new_zeros(())
        readers = ((self.place, layers[1]), (self.asked, layers[2]), (self.thing, layers[2]))
        for (reader, layer), targets in zip(readers, wanted, strict=True):
            mask = targets != IGNORED
            if mask.any():
                loss = loss + nn.functional.cross_entropy(reader(layer[mask]), targets[mask])
        return loss


def _language_loss(
    model: LlavaForConditionalGeneration,
    cache: torch.Tensor,
    group: Sequence[Example],
    probes: Probes,
) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    width = max(len(example.ids) for example in group)

    # Padding stands on the right here and no mask is needed: a causal model never looks at it.
    def padded(rows: Iterable[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    ids = padded((e.ids for e in group), config.text_config.pad_token_id)
    wanted = padded((e.labels for e in group), IGNORED)[:, 1:]
    embeddings = model.get_input_embeddings()(ids)
    images = [index for example in group for index in example.images]
    if images:
        features = cache[images].to(embeddings.dtype)
        embeddings = embeddings.masked_scatter((ids == config.image_token_id).unsqueeze(-1), features)
    output = model.model.language_model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
    mask = wanted != IGNORED
    # Only answers are scored, so only their positions go through the output layer.
    answers = nn.functional.cross_entropy(model.lm_head(output.last_hidden_state[:, :-1][mask]), wanted[mask])
    facts = [padded(rows, IGNORED) for rows in zip(*((e.places, e.asked, e.things) for e in group), strict=True)]
    return answers, probes(output.hidden_states, facts)


def train_language_model(
    model: LlavaForConditionalGeneration, cache: torch.Tensor, encode: Encoder, author: Author, recipe: Recipe
) -> None:
    """Stage 2: teach the language model to answer, on short conversations first and on long ones last."""
    total = sum(phase.steps for phase in recipe.phases)
    probes = Probes(model.config.text_config.hidden_size)
    optimizer = Optimizer([model.model.language_model], recipe.language_rate, total, [probes])
    done, running = 0, math.nan
    for phase in recipe.phases:
        for group in batches(encode, author, phase):
            answers, probed = _language_loss(model, cache, group, probes)
            optimizer.step(answers + recipe.probe_weight * probed)
            done += 1
            running = answers.item() if math.isnan(running) else 0.98 * running + 0.02 * answers.item()
            if done % 100 == 0:
                LOGGER.info("language step %d/%d: loss %.4f", done, total, running)


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
    train_vision_tower(model, album, recipe)
    scale_image_tokens(model, album)
    LOGGER.info("vision tower done: CPU %.0f s", time.process_time() - started)
    cache = cache_image_tokens(model, album, recipe.cached_images)
    torch.manual_seed(seed + 1)
    unnamed = album.scenes[recipe.images : recipe.cached_images]
    author = Author(random.Random(f"{seed}/language"), held_out=False, unnamed=unnamed)
    encode = Encoder(processor, album.drawings(recipe.cached_images), author.rng)
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
        colours=", ".join(vision_data.COLOURS),
        shapes=", ".join(vision_data.SHAPES),
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
        minutes=seconds / 60,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def answer(
    model: LlavaForConditionalGeneration, processor: Any, conversations: Sequence[Conversation], seed: int
) -> list[str]:
    """Greedy replies to the last question of each conversation, in one left-padded batch."""
    rng = random.Random(seed)
    texts = [processor.apply_chat_template(c.messages()[:-1], add_generation_prompt=True) for c in conversations]
    images = [vision_data.render(scene, rng) for c in conversations for scene in c.images()]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=32)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _score(model: Any, processor: Any, conversations: Sequence[Conversation], batch: int, seed: int) -> float:
    ordered = sorted(conversations, key=lambda c: (len(c.images()), len(str(c.messages()))))
    right = 0
    for start in range(0, len(ordered), batch):
        chunk = ordered[start : start + batch]
        replies = answer(model, processor, chunk, seed + start)
        for conversation, reply in zip(chunk, replies, strict=True):
            right += reply == conversation.turns[-1].answer
            if reply != conversation.turns[-1].answer:
                LOGGER.debug("%s: said %r", conversation.turns[-1], reply)
    return right / len(ordered)


def held_out_behind_history(
    processor: Any, skill: str, prompts: int = HISTORY_PROMPTS, seed: int = 1, history_tokens: int = HISTORY_TOKENS
) -> list[Conversation]:
    """Conversations ending in a question of `skill` behind at least `history_tokens` tokens of other turns."""

    def cost(turn: Turn) -> int:
        text = processor.apply_chat_template(turn.messages()).replace(IMAGE, IMAGE * IMAGE_TOKENS)
        return len(processor.tokenizer.encode(text, add_special_tokens=False))

    conversations = vision_data.held_out_conversations(skill, prompts, seed)
    return [vision_data.with_history(c, history_tokens, i, cost) for i, c in enumerate(conversations)]


def evaluate(folder: pathlib.Path) -> dict[str, float]:
    """Greedy exact-match accuracy per skill on held-out scenes, alone and behind a history of earlier turns."""
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, local_files_only=True
    ).eval()
    scores: dict[str, float] = {}
    for skill in vision_data.SKILLS:
        conversations = vision_data.held_out_conversations(skill, PROMPTS)
        scores[skill] = _score(model, processor, conversations, batch=50, seed=0)
    for skill in vision_data.SKILLS:
        behind = held_out_behind_history(processor, skill)
        # One at a time: without padding, attention needs no mask, which is twice as fast at this length.
        scores[f"{skill}_behind_history"] = _score(model, processor, behind, batch=1, seed=0)
    return scores
