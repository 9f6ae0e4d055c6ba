"""Stage three of the recipe: the language model learns to answer over the frozen tower's image tokens."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from models.muon import Optimizer
from models.vision_data import Author, Conversation, Turn
from models.vision_model import CONTEXT, END, IGNORED, IMAGE, IMAGE_TOKENS, START
from models.vision_recipe import Phase, Recipe
from models.vision_scenes import COLOURS, SHAPES, Scene, would_be_held_out

LOGGER = logging.getLogger(__name__)

THINGS = (*COLOURS, *SHAPES)
MISREAD = 0.25


@dataclass
class Example:
    """One encoded conversation, and the album's images in order.

    Beside the ids, for every token: its label if an answer that is trained on holds it; for image tokens, the image's
    place in its message; and along an answer about one of two images, the place or the thing that was asked for. Where
    a label names something, the ids of the names that would make the scene a held-out one are not counted as wrong.
    """

    ids: list[int]
    labels: list[int]
    ruled_out: dict[int, list[int]]
    places: list[int]
    asked: list[int]
    things: list[int]
    images: list[int]


def name_tokens(tokenizer: PreTrainedTokenizerFast, names: Sequence[str]) -> dict[int, str]:
    """The names by their tokens: frequent as they are, each is one."""
    tokens = {}
    for name in names:
        (token,) = tokenizer.encode(f" {name}", add_special_tokens=False)
        tokens[token] = name
    return tokens


@torch.no_grad()
def name_embeddings(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, vectors: torch.Tensor
) -> None:
    """Start the embeddings of all colours and shapes from the vectors that image tokens say them with."""
    tokens = list(name_tokens(tokenizer, THINGS))
    model.get_input_embeddings().weight[tokens] = vectors


class Encoder:
    """Turns conversations into examples through the same template and tokenizer that serving uses."""

    def __init__(self, processor: LlavaProcessor, drawings: dict[Scene, list[int]], rng: random.Random) -> None:
        self.processor, self.tokenizer, self.drawings, self.rng = processor, processor.tokenizer, drawings, rng
        self.header = self.tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
        self.end, self.image = self.tokenizer.convert_tokens_to_ids([END, IMAGE])
        self._names = {
            "colour": name_tokens(self.tokenizer, COLOURS),
            "shape": name_tokens(self.tokenizer, SHAPES),
        }
        self._is_name = self._names["colour"] | self._names["shape"]

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
        ruled_out = self._ruled_out(labels, conversation.turns)
        return Example(self._misread(ids, labels), labels, ruled_out, places, asked, things, images)

    def _ruled_out(self, labels: list[int], turns: Sequence[Turn]) -> dict[int, list[int]]:
        """For the positions of names in answers, the other names that no training scene could have there."""
        named = [position for position, label in enumerate(labels) if label in self._is_name]
        asked = [(turn.about, field) for turn in turns if turn.trained and turn.about for field in turn.fields]
        return {
            position: [
                token
                for token, name in self._names["shape" if field == "shape" else "colour"].items()
                if would_be_held_out(scene, field, name)
            ]
            for position, (scene, field) in zip(named, asked, strict=True)
        }

    def _misread(self, ids: list[int], labels: list[int]) -> list[int]:
        """The ids with some names in answers exchanged: each name must come from the image, not from another name."""
        read = list(ids)
        for names in map(list, self._names.values()):
            for position, label in enumerate(labels):
                if label in names and self.rng.random() < MISREAD:
                    read[position] = self.rng.choice(names)
        return read

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
        # An unseen pair of colour and shape shows more faintly than those of the training.
        features = cache[images].to(embeddings.dtype) * torch.empty(len(images), 1, 1).uniform_(0.6, 1.2)
        embeddings = embeddings.masked_scatter((ids == config.image_token_id).unsqueeze(-1), features)
    output = model.model.language_model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
    mask = wanted != IGNORED
    # Only answers are scored, so only their positions go through the output layer.
    logits = model.lm_head(output.last_hidden_state[:, :-1][mask])
    order = {place: row for row, place in enumerate(map(tuple, mask.nonzero().tolist()))}
    ruled_out = [
        (order[row, position - 1], token)
        for row, example in enumerate(group)
        for position, tokens in example.ruled_out.items()
        for token in tokens
    ]
    if ruled_out:
        rows, tokens = torch.tensor(ruled_out).T
        logits = logits.index_put((rows, tokens), torch.tensor(-math.inf))
    answers = nn.functional.cross_entropy(logits, wanted[mask])
    facts = [padded(rows, IGNORED) for rows in zip(*((e.places, e.asked, e.things) for e in group), strict=True)]
    return answers, probes(output.hidden_states, facts)


def train_language_model(
    model: LlavaForConditionalGeneration, cache: torch.Tensor, encode: Encoder, author: Author, recipe: Recipe
) -> None:
    """Stage 3: teach the language model to answer, on short conversations first and on long ones last."""
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
