"""What a model's configuration files say about it: task, context, capabilities, and what makes it unsafe."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.domain.catalog import Capability, Task
from serve_app.domain.errors import CapabilityMissing, ModelLoadFailed, ModelUnsafe
from serve_app.engines.files import read_json, read_object
from serve_app.engines.tools import takes_tools

MAX_TEMPLATE_BYTES = 64 * 1024

GENERATIVE = frozenset({Task.TEXT_GENERATION, Task.TEXT2TEXT_GENERATION, Task.IMAGE_TEXT_TO_TEXT})

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
"""Where composite models keep the configuration of their language model."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)

_VIDEO_FAMILIES = """
cohere2_vision cohere_compass cosmos3_edge ernie4_5_vl_moe gemma4 gemma4_unified glm46v glm4v glm5_next internvl
kimi_k25 lfm2_vl llama4 llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minimax_m3_vl molmo2 muse_glimmer
nemotron_h_omni perception_lm qianfan_ocr qwen2_5_omni qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe
qwen3_omni_moe smolvlm video_llama_3 video_llava
"""

NEED_TORCHVISION = frozenset(_VIDEO_FAMILIES.split())
"""Model types whose processor cannot be made without torchvision in transformers 5.23: they have a video processor,
or an image processor without a Pillow backend (``models/auto/auto_mappings.py``)."""


@dataclass(frozen=True, slots=True)
class Configs:
    """The parsed configuration files of one folder; an absent file is an empty mapping."""

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    sentence: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    pipeline_tag: str | None = None

    @property
    def architecture(self) -> str | None:
        names = self.model.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else None

    @property
    def model_type(self) -> str:
        return str(self.model.get("model_type", ""))


def read_configs(path: Path, names: frozenset[str]) -> Configs:
    """Read what there is.

    Raises:
        ModelUnsafe: a file asks for code of its own, or a chat template is too large.
        ModelLoadFailed: a file cannot be read or is not what it should be.
    """
    refuse_code(path, names)
    sentence = read_object(path / "sentence_bert_config.json")
    tokenizer = read_object(path / "tokenizer_config.json")
    return Configs(
        model=read_object(path / "config.json"),
        tokenizer=tokenizer,
        processor=read_object(path / "processor_config.json"),
        preprocessor=read_object(path / "preprocessor_config.json"),
        sentence=sentence,
        modules=_module_types(path),
        templates=_templates(path, names, tokenizer),
        pipeline_tag=_pipeline_tag(path / "README.md"),
    )


def refuse_code(path: Path, names: frozenset[str]) -> None:
    """Refuse a folder that brings code: ``auto_map`` at any depth, ``trust_remote_code``, ``custom_generate/``."""
    if any(name.startswith("custom_generate/") for name in names):
        raise ModelUnsafe(
            "The model brings its own generation code (custom_generate/). Rotunda runs no code of a model."
        )
    for name in sorted(names):
        if "/" in name or not name.endswith(".json") or ("config" not in name and name != "modules.json"):
            continue
        if any(value and key in ("auto_map", "trust_remote_code") for key, value in _pairs(path / name)):
            raise ModelUnsafe(f"{name} asks for code of the model's own (auto_map). Rotunda runs no code of a model.")


def _pairs(path: Path) -> Iterator[tuple[str, Any]]:
    pending = [read_json(path)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _module_types(path: Path) -> tuple[str, ...]:
    if not (path / "modules.json").exists():
        return ()
    modules = read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelLoadFailed("modules.json does not hold a list of modules.")
    types = tuple(str(module.get("type", "")) for module in modules)
    if not all(kind.startswith("sentence_transformers.") for kind in types):
        raise ModelUnsafe("modules.json asks for code of the model's own. Rotunda runs no code of a model.")
    return types


def _templates(path: Path, names: frozenset[str], tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    found: list[object] = [tokenizer.get("chat_template")]
    found.append(read_object(path / "chat_template.json").get("chat_template"))
    for name in sorted(names):
        if name == "chat_template.jinja" or (name.startswith("additional_chat_templates/") and name.endswith(".jinja")):
            found.append(_bounded_text(path / name))
    texts = [text for item in found for text in _template_texts(item)]
    if any(len(text.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES for text in texts):
        raise ModelUnsafe(f"A chat template of the model is larger than {MAX_TEMPLATE_BYTES} bytes.")
    return tuple(texts)


def _template_texts(item: object) -> list[str]:
    """A template is a string, or a list of ``{"name", "template"}``."""
    if isinstance(item, str):
        return [item]
    entries = item if isinstance(item, list) else []
    return [str(entry["template"]) for entry in entries if isinstance(entry, dict) and "template" in entry]


def _bounded_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_TEMPLATE_BYTES + 1).decode("utf-8", "replace")
    except OSError as fault:
        raise ModelLoadFailed(f"{path.name} cannot be read ({fault.strerror}).") from fault


def _pipeline_tag(readme: Path) -> str | None:
    """``pipeline_tag`` of a model card's front matter."""
    try:
        if not readme.is_file():
            return None
        with open(readme, "rb") as file:
            lines = file.read(8192).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        if line.startswith("pipeline_tag:"):
            return line.partition(":")[2].strip().strip("'\"")
    return None


def sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration itself, then the language model's within it."""
    yield config
    for key in TEXT_SECTIONS:
        below = config.get(key)
        if isinstance(below, dict):
            yield from sections(below)


def task_of(configs: Configs, default: Task | None) -> Task:
    """What the model is for.

    Raises:
        CapabilityMissing: the files do not say and there is no default, or it is for something else.
    """
    if configs.modules:
        return Task.FEATURE_EXTRACTION
    name = configs.architecture or ""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return Task.TEXT_GENERATION
    if name.endswith(("ForConditionalGeneration", "ForImageTextToText", "ForVision2Seq")):
        return _conditional_task(configs)
    if configs.pipeline_tag in set(Task):
        return Task(configs.pipeline_tag)
    if name.endswith("Model") or (not name and default):
        return default or Task.FEATURE_EXTRACTION
    if name:
        raise CapabilityMissing(f"A {name} neither generates text nor embeds it.")
    raise CapabilityMissing("The files do not say what the model is for. Set HF_DEFAULT_TASK, or its task.")


def _conditional_task(configs: Configs) -> Task:
    if "num_mel_bins" in configs.model or ("audio_config" in configs.model and "vision_config" not in configs.model):
        raise CapabilityMissing("The model listens to audio; Rotunda serves text and images.")
    if "vision_config" in configs.model or configs.preprocessor.get("image_processor_type"):
        return Task.IMAGE_TEXT_TO_TEXT
    return Task.TEXT2TEXT_GENERATION


def context_of(configs: Configs, task: Task) -> int | None:
    """The longest sequence, in tokens, that the positions of the model reach; None where nothing limits it."""
    for section in sections(configs.model):
        for key in CONTEXT_KEYS:
            value = section.get(key)
            if type(value) is int and value > 0:
                return _shorter(value, configs) if task is Task.FEATURE_EXTRACTION else value
    limit = configs.tokenizer.get("model_max_length")
    return limit if type(limit) is int and 0 < limit < 1_000_000_000 else None


def _shorter(limit: int, configs: Configs) -> int:
    trained = configs.sentence.get("max_seq_length")
    return min(limit, trained) if type(trained) is int and trained > 0 else limit


def capabilities_of(configs: Configs, task: Task) -> frozenset[Capability]:
    if task is Task.FEATURE_EXTRACTION:
        return frozenset({Capability.EMBEDDINGS})
    found = {Capability.COMPLETION}
    if configs.templates:
        found |= {Capability.CHAT, Capability.CHAT_TEMPLATE}
    if any(takes_tools(template) for template in configs.templates):
        found.add(Capability.TOOLS)
    if task is Task.IMAGE_TEXT_TO_TEXT:
        found.add(Capability.VISION)
    return frozenset(found)


def quantization_of(configs: Configs) -> str | None:
    """The method, with its bits where they are told: ``"gptq-4bit"``."""
    settings = configs.model.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method", "unknown"))
    bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else settings.get("bits")
    return f"{method}-{bits}bit" if bits else method


def check_files(configs: Configs, task: Task, names: frozenset[str]) -> None:
    """Refuse what is sure to fail for want of a file or a package."""
    if not any(name in names for name in TOKENIZER_FILES):
        raise ModelLoadFailed("The folder holds no tokenizer. Download it again, whole.")
    if task is not Task.IMAGE_TEXT_TO_TEXT:
        return
    if not configs.preprocessor and not configs.processor:
        raise ModelLoadFailed(
            "The folder holds no image processor (preprocessor_config.json). Download it again, whole."
        )
    if configs.model_type in NEED_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        raise CapabilityMissing("The images of this model need torchvision: install rotunda[vision].")
