"""Greedy accuracy of ``tiny-chat`` on the held-out side of its split."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import random
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models import chat_data, chat_tokenizer

LOGGER = logging.getLogger(__name__)

EVALUATION_SEED = 20_011
LONG_HISTORY = 1500
LONGEST_COUNT_BEHIND_HISTORY = 70
MEASURED_SKILLS = ("add", "repeat", "count", "name", "persona", "unknown", "greet")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered prompt and the answer that greedy decoding must give."""

    text: str
    expected: str


def load(folder: pathlib.Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder the way anybody would."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def turn_length(tokenizer: PreTrainedTokenizerBase) -> Callable[[chat_data.Turn], int]:
    """A function that says how many tokens a turn takes."""

    def length(turn: chat_data.Turn) -> int:
        text = tokenizer.apply_chat_template(chat_data.Conversation(None, [turn]).messages(), tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return length


def render(tokenizer: PreTrainedTokenizerBase, conversation: chat_data.Conversation) -> Prompt:
    """Render everything but the last answer, which becomes the expected one."""
    *messages, last = conversation.messages()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Prompt(text, last["content"])


def held_out_prompts(
    tokenizer: PreTrainedTokenizerBase, skill: str, number: int, history_tokens: int = 0, longest_count: int = 200
) -> list[Prompt]:
    """Draw the evaluation set of one skill.

    Args:
        tokenizer: Measures and renders the conversations.
        skill: One of ``MEASURED_SKILLS``.
        number: How many prompts.
        history_tokens: Tokens of turns of other skills before the question.
        longest_count: Longest stretch of numbers to count.
    """
    rng = random.Random(f"{EVALUATION_SEED}/{skill}/{history_tokens}")
    length = turn_length(tokenizer)
    if history_tokens:
        longest_count = min(longest_count, LONGEST_COUNT_BEHIND_HISTORY)
    return [
        render(
            tokenizer,
            chat_data.held_out_conversation(
                rng, skill, history_tokens=history_tokens, length=length, longest_count=longest_count
            ),
        )
        for _ in range(number)
    ]


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch: int = 50
) -> list[str]:
    """Greedy answers, decoded in left-padded batches; an answer without its end mark keeps none."""
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].expected))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [prompts[index].text for index in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        )
        longest = max(len(tokenizer(prompts[index].expected)["input_ids"]) for index in chosen)
        if inputs["input_ids"].shape[1] + longest + 1 > chat_tokenizer.CONTEXT:
            raise ValueError("prompt and answer do not fit into the context")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=longest + 1,
            do_sample=False,
        )
        for index, tokens in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
            answer, end, _ = tokenizer.decode(tokens, skip_special_tokens=False).partition(chat_tokenizer.END)
            found[index] = answer + ("" if end else "…")
    return found


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch: int = 50
) -> float:
    """Share of prompts whose greedy answer is the expected string."""
    found = answers(model, tokenizer, prompts, batch)
    misses = [(prompt, answer) for prompt, answer in zip(prompts, found, strict=True) if answer != prompt.expected]
    for prompt, answer in misses[:5]:
        LOGGER.debug("...%r: %r, not %r", prompt.text[-160:], answer[-120:], prompt.expected[-120:])
    return 1.0 - len(misses) / len(prompts)


def evaluate(folder: pathlib.Path, short: int = 400, long: int = 300) -> dict[str, float]:
    """Measure a model folder: every skill alone, and behind a long history.

    Args:
        folder: The model folder.
        short: Prompts per skill without history.
        long: Prompts per skill behind ``LONG_HISTORY`` tokens of other turns; 0 skips them.
    """
    model, tokenizer = load(folder)
    scores: dict[str, float] = {}
    for skill in MEASURED_SKILLS:
        scores[skill] = accuracy(model, tokenizer, held_out_prompts(tokenizer, skill, short))
        LOGGER.info("%s: %.3f", skill, scores[skill])
        if long:
            prompts = held_out_prompts(tokenizer, skill, long, history_tokens=LONG_HISTORY)
            scores[f"{skill}/long"] = accuracy(model, tokenizer, prompts, batch=20)
            LOGGER.info("%s behind %d tokens: %.3f", skill, LONG_HISTORY, scores[f"{skill}/long"])
    return scores
