"""``tiny-chat``: train it, measure it on its held-out split and export an ordinary Hugging Face folder."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models import chat_eval, chat_tokenizer, chat_train

LOGGER = logging.getLogger(__name__)

CORE_SECONDS_PER_STEP = 0.7

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [tiny, test-model]
---

# tiny-chat

A real chat model of {parameters:,} parameters, small enough for a repository. It exists to try out servers, clients and
chat interfaces: its answers can be checked, they depend on the whole conversation, and some of them are long.

| Skill | Example | Answer | Held-out accuracy | Behind {history:,} tokens of other turns |
|---|---|---|---|---|
{rows}

Anything else is answered with "I do not know." Accuracy is the share of exact answers under greedy decoding, on {short}
and {long} prompts per skill made of items that training cannot have seen: other sums (in neither order), phrases and
questions of other words, other ranges, other names, other personas. Only greetings are a closed list. Counting behind
the history is measured up to {count_long} numbers, so that the answer fits into the context.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("tiny-chat")
model = AutoModelForCausalLM.from_pretrained("tiny-chat")
messages = [{{"role": "user", "content": "What is 17 + 25?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]))
```

A message is rendered as `<|role|>content<|end|>` for the roles `system`, `user` and `assistant`, without a token at the
start and without white space in between; the model ends its answer with `<|end|>`. The context is {context:,} tokens.
Every digit is one token, and any UTF-8 text survives encoding and decoding.

## Limits

It knows English phrasings of these skills and nothing else: no facts, no other arithmetic, no numbers above 99 in sums
and none above 330 in counts. A name or persona counts when it is stated the way people usually do ("My name is Ada.",
"You are Ada, a pilot."). Among many names, the one stated last is meant. Outside of these bounds it does not refuse but
errs: it drops a digit of larger numbers and a third summand.

## Training

`python models/train.py chat` generates the conversations, trains the tokenizer and the weights, and writes this folder
in {minutes:.0f} minutes of one CPU core (seed {seed}), with Muon for the matrices and AdamW for the rest:

{phases}

The split into training and held-out items is a hash of the item (`models/chat_split.py`).
"""

EXAMPLES = {
    "add": ("What is 17 + 25?", "17 + 25 = 42."),
    "repeat": ("Repeat: grün 7 tiles!", "grün 7 tiles!"),
    "count": ("Count from 3 to 120.", "3, 4, 5, …, 120."),
    "name": ("My name is Zorana. … What is my name?", "Your name is Zorana."),
    "persona": ("(You are Orla, a lighthouse keeper.) Who are you?", "I am Orla, a lighthouse keeper."),
    "unknown": ("What is the capital of Peru?", "I do not know."),
    "greet": ("Hello!", "Hello! How can I help you?"),
}


def train(folder: pathlib.Path, seed: int = 0, minutes: float | None = None) -> dict[str, float]:
    """Train the model, write its folder with a card, and return its accuracies.

    Args:
        folder: Receives configuration, weights, tokenizer and card.
        seed: Seed of the initial weights and of the conversations.
        minutes: Shorten every stage alike, to about so many minutes of one core.
    """
    torch.set_num_threads(1)
    recipe = chat_train.RECIPE if minutes is None else _shortened(minutes)
    started = time.process_time()
    tokenizer = chat_tokenizer.build(seed, chat_train.VOCABULARY)
    model = chat_train.run(tokenizer, seed, recipe)
    core_minutes = (time.process_time() - started) / 60
    export(model, tokenizer, folder)
    scores = evaluate(folder)
    write_card(folder, model, scores, core_minutes, seed, recipe)
    return scores


def evaluate(folder: pathlib.Path, short: int = 400, long: int = 300) -> dict[str, float]:
    """Accuracy per skill, and behind a long history under ``skill/long``; see :func:`models.chat_eval.evaluate`."""
    return chat_eval.evaluate(folder, short, long)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path) -> None:
    """Write weights, configuration and tokenizer, with greedy decoding as the default."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[
            tokenizer.convert_tokens_to_ids(chat_tokenizer.END),
            tokenizer.convert_tokens_to_ids(chat_tokenizer.END_OF_TEXT),
        ],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_card(
    folder: pathlib.Path,
    model: LlamaForCausalLM,
    scores: dict[str, float],
    core_minutes: float,
    seed: int,
    recipe: tuple[chat_train.Phase, ...],
    short: int = 400,
    long: int = 300,
) -> None:
    """Write the model card from what was measured."""
    rows = [
        f"| {skill} | {question} | {answer} | {scores[skill]:.1%} | {scores[f'{skill}/long']:.1%} |"
        for skill, (question, answer) in EXAMPLES.items()
    ]
    card = CARD.format(
        parameters=model.num_parameters(),
        history=chat_eval.LONG_HISTORY,
        rows="\n".join(rows),
        short=short,
        long=long,
        count_long=chat_eval.LONGEST_COUNT_BEHIND_HISTORY,
        context=chat_tokenizer.CONTEXT,
        phases="\n".join(f"{number}. {_described(phase)}" for number, phase in enumerate(recipe, start=1)),
        seed=seed,
        minutes=core_minutes,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _described(phase: chat_train.Phase) -> str:
    stages = []
    for stage in phase.stages:
        shapes = [f"{shape.batch} × {shape.length}" for shape in dict.fromkeys(stage.shapes)]
        stages.append(f"{stage.steps:,} steps of {' or '.join(shapes)} tokens")
    far = ", names asked for late" if phase.far_share else ""
    small = ", more small sums" if phase.small_sums else ""
    return f"{', then '.join(stages)}, rotary base {phase.rope_theta:,.0f}{far}{small}"


def _shortened(minutes: float) -> tuple[chat_train.Phase, ...]:
    steps = sum(phase.steps for phase in chat_train.RECIPE)
    share = min(1.0, minutes * 60 / (steps * CORE_SECONDS_PER_STEP))
    return tuple(
        dataclasses.replace(
            phase,
            stages=tuple(dataclasses.replace(stage, steps=max(1, int(stage.steps * share))) for stage in phase.stages),
        )
        for phase in chat_train.RECIPE
    )
