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


def save_t5(path: Path, seed: int = 0, **settings: Any) -> Path:
    """An encoder-decoder without a chat template."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=4,
        eos_token_id=2, pad_token_id=4, initializer_factor=5.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.generation_config.update(**settings)
    model.save_pretrained(path)
    tokenizer(None).save_pretrained(path)
    return path


def save_idefics(path: Path, seed: int = 0) -> Path:
    """An Idefics3, whose processor cuts a picture into tiles."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    torch.manual_seed(seed)
    made = tokenizer()
    names = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_tiles()]
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL[:4], *names]})
    vision = Idefics3VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(**(SIZES | {"vocab_size": len(made)}), pad_token_id=4)
    config = Idefics3Config(vision_config=vision, text_config=text, image_token_id=3, scale_factor=2)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=2, pad_token_id=4)
    model.save_pretrained(path)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    Idefics3Processor(images, made, image_seq_len=1, chat_template=CHATML).save_pretrained(path)
    return path


def _tiles() -> list[str]:
    return [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
