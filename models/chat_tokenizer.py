"""Tokenizer and chat template of ``tiny-chat``."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models import chat_data

SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
END, END_OF_TEXT, PAD = "<|end|>", "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, END_OF_TEXT, END, SYSTEM, USER, ASSISTANT]
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
CONTEXT = 2048

# A space belongs to the word after it, except behind a colon: the phrase of "Repeat: ..." then splits in the question
# as it does in the answer. ", " before a digit is one token, which makes counting a fifth shorter. Digits stand alone.
PIECES = r"(?<=:)\s|, (?=\p{N})|\p{N}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s"

# Contents are rendered untouched, so the last message can be continued and "Repeat: ..." keeps its spaces.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('tiny-chat knows the roles system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] != 'text' -%}
                {{- raise_exception('tiny-chat reads text only, not ' + part['type']) -}}
            {%- endif -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def build(seed: int, size: int, conversations: int = 4000) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from training conversations.

    Args:
        seed: Seed of the conversations.
        size: Number of tokens, special tokens included.
        conversations: How many conversations to read.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, conversations), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, SYSTEM, USER, ASSISTANT],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _texts(seed: int, conversations: int) -> list[str]:
    rng = random.Random(seed)
    texts: list[str] = []
    weights = dict.fromkeys(chat_data.KINDS, 1.0)
    for _ in range(conversations):
        left = iter(range(8))
        conversation = chat_data.training_conversation(
            rng, weights, lambda _, left=left: next(left, None) is not None, 8
        )
        texts.extend(message["content"] for message in conversation.messages())
    return texts
