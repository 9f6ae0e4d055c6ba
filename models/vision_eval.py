"""Measure `tiny-vision` on held-out scenes: greedy replies, compared whole."""

from __future__ import annotations

import logging
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from models import vision_data, vision_scenes
from models.vision_data import Conversation, Turn
from models.vision_model import IMAGE, IMAGE_TOKENS

LOGGER = logging.getLogger(__name__)

PROMPTS, HISTORY_PROMPTS, HISTORY_TOKENS = 300, 300, 1_500


def answer(
    model: LlavaForConditionalGeneration, processor: Any, conversations: Sequence[Conversation], seed: int
) -> list[str]:
    """Greedy replies to the last question of each conversation, in one left-padded batch."""
    rng = random.Random(seed)
    texts = [processor.apply_chat_template(c.messages()[:-1], add_generation_prompt=True) for c in conversations]
    images = [vision_scenes.render(scene, rng) for c in conversations for scene in c.images()]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=32)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out(skill: str, prompts: int = PROMPTS, seed: int = 0) -> list[Conversation]:
    """Conversations about held-out scenes that end in a question of `skill`."""
    return vision_data.held_out_conversations(skill, prompts, seed)


def held_out_behind_history(
    processor: Any, skill: str, prompts: int = HISTORY_PROMPTS, seed: int = 1, history_tokens: int = HISTORY_TOKENS
) -> list[Conversation]:
    """The like behind at least `history_tokens` tokens of other turns, with images of their own."""

    def cost(turn: Turn) -> int:
        text = processor.apply_chat_template(turn.messages()).replace(IMAGE, IMAGE * IMAGE_TOKENS)
        return len(processor.tokenizer.encode(text, add_special_tokens=False))

    conversations = held_out(skill, prompts, seed)
    return [vision_data.with_history(c, history_tokens, i, cost) for i, c in enumerate(conversations)]


def accuracy(
    model: Any, processor: Any, conversations: Sequence[Conversation], batch: int = 50, seed: int = 0
) -> float:
    """The share of conversations whose last reply is right to the letter.

    Long conversations are faster one at a time: without padding, attention needs no mask.
    """
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


def load(folder: pathlib.Path) -> tuple[LlavaForConditionalGeneration, Any]:
    """Model and processor of a folder, as serving loads them."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def evaluate(folder: pathlib.Path) -> dict[str, float]:
    """Accuracy per skill, alone and behind a history of earlier turns."""
    model, processor = load(folder)
    alone = {skill: accuracy(model, processor, held_out(skill)) for skill in vision_data.SKILLS}
    behind = {
        f"{skill}_behind_history": accuracy(model, processor, held_out_behind_history(processor, skill), batch=1)
        for skill in vision_data.SKILLS
    }
    return alone | behind
