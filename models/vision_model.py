"""The parts of `tiny-vision` before any training: tokenizer, chat template, processor and model."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from models.vision_data import Author

IMAGE_SIDE = 48
PATCH = 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
VOCABULARY = 512
CONTEXT = 2048
START, END, END_OF_TEXT, PAD, IMAGE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>", "<image>"
IGNORED = -100

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
        hidden_act="gelu",
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
