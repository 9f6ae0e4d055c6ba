"""Tiny models with random weights, made on the spot: real files, real tokenizers, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<pad>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Hello, how are you? I am fine, thank you.",
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "é ü 你好 🙂",
]


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens; ends with <|im_end|>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", additional_special_tokens=SPECIAL[:4]
    )
    made.chat_template = template
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def save_causal(path: Path, config: Any = None, template: str | None = CHATML, seed: int = 0, **settings: Any) -> Path:
    """A decoder-only model (Llama unless a configuration is given) with random weights, chat template included."""
    from transformers import LlamaConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES))
    # Random weights are nearly uniform: sharpen them, so that the likeliest token is well ahead of the others.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.update(**({"eos_token_id": 2, "pad_token_id": 4} | settings))
    model.save_pretrained(path)
    tokenizer(template).save_pretrained(path)
    return path


def save_llava(path: Path, seed: int = 0) -> Path:
    """A LLaVA of 30 kB: CLIP with four patches of 14 pixels, Llama, and the processor that Pillow alone serves."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=3, vision_feature_layer=-1
    )
    model = Llava(config)
    model.generation_config.update(eos_token_id=2, pad_token_id=4)
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    made = tokenizer()
    LlavaProcessor(
        images, made, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=CHATML,
    ).save_pretrained(path)  # fmt: skip
    return path
