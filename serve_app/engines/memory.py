"""How much memory a model will need, from its files and settings, before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from serve_app.domain.catalog import ModelInfo
from serve_app.domain.errors import InvalidConfig, ModelLoadFailed
from serve_app.engines.base import EngineOptions
from serve_app.engines.configs import sections
from serve_app.engines.files import read_object
from serve_app.engines.pace import BLOCK

PROCESS_BYTES = 400 * 1024 * 1024
"""A process with torch and transformers that has answered, and shares nothing with others (measured, CPU builds)."""
GRAPH_BYTES = 256 * 1024 * 1024
"""What the CUDA graphs of a model's steps hold, their logits included."""
DEFAULT_CONTEXT = 2048
KV_TOKENS = 32_768
"""Tokens that all requests of a replica hold together, where neither one context nor the settings need more."""
CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
"""Where versions 2 and 1 of cgroups show what the container of this process may use."""
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes by part. ``total`` is what a replica must be given."""

    weights: int
    kv_cache: int
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.process

    def to_json(self) -> dict[str, int]:
        return {"weights": self.weights, "kvCache": self.kv_cache, "process": self.process, "total": self.total}


def node_memory() -> tuple[int, int]:
    """Bytes in use, and bytes that there are, on this machine or in the container that this process runs in.

    What can be given back at once (caches) does not count as in use.
    """
    machine = psutil.virtual_memory()
    used, total = machine.total - machine.available, machine.total
    limit, charged = _cgroup("memory.max", "memory.limit_in_bytes"), _cgroup("memory.current", "memory.usage_in_bytes")
    if limit is None or charged is None or limit >= total:
        return used, total
    return max(0, charged - _inactive_file()), limit


def _cgroup(*names: str) -> int | None:
    """A number of the container's memory controller, by its names in versions 2 and 1 of cgroups."""
    for folder, name in zip(CGROUPS, names, strict=True):
        try:
            return int((folder / name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such version, or no limit ("max")
            continue
    return None


def _inactive_file() -> int:
    for folder, name in zip(CGROUPS, ("inactive_file", "total_inactive_file"), strict=True):
        try:
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
    return 0


def extra(options: EngineOptions, name: str, default: Any) -> Any:
    return dict(options.extra).get(name, default)


def context_limit(info: ModelInfo, options: EngineOptions) -> int | None:
    """Tokens that prompt and reply may have together: the model's own limit or a lower one of the settings."""
    return min((limit for limit in (info.context_length, options.context_length) if limit), default=None)


def kv_tokens(info: ModelInfo, options: EngineOptions) -> int:
    """Tokens that all running requests may hold together; the engine admits no more at once.

    One whole context always fits. ``extra`` may set ``kv_tokens``.
    """
    context = context_limit(info, options) or DEFAULT_CONTEXT
    given = extra(options, "kv_tokens", None)
    return max(context, int(given) if given else min(context * options.max_concurrency, KV_TOKENS))


def load_dtype(info: ModelInfo, options: EngineOptions) -> str:
    """The dtype in which the model will compute: the checkpoint's or the one asked for, but half precision becomes
    float32 on a CPU that would only emulate it (0.5–0.6 of the speed, ENGINE.md)."""
    wanted = options.dtype if options.dtype != "auto" else info.dtype or "float32"
    if wanted not in ("bfloat16", "float16") or extra(options, "use_gpu", False) or info.quantization:
        return wanted
    return wanted if wanted == "bfloat16" and cpu_has_bfloat16() else "float32"


def quantization(options: EngineOptions) -> str | None:
    """How the weights are held: ``extra`` may set ``quantize`` to "int8", on a CPU.

    Raises:
        InvalidConfig: it is set to something else, or there is a GPU.
    """
    kind = extra(options, "quantize", None)
    if kind is None:
        return None
    if kind != "int8" or extra(options, "use_gpu", False):
        raise InvalidConfig("quantize is int8, for models on a CPU.")
    return str(kind)


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (Linux; false where that cannot be known)."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def needed_bytes(info: ModelInfo, options: EngineOptions) -> MemoryNeed:
    """The need of one replica: weights as they will be cast, keys and values of :func:`kv_tokens`, and the process
    (with its CUDA graphs, on a GPU).

    Keys and values: 2 · layers · kv_heads · head_dim · item bytes · tokens; layers with a sliding window count like the
    others, since rows keep all tokens (:mod:`serve_app.engines.cache`).

    Raises:
        ModelLoadFailed: the model's config.json cannot be read, or it has no weights.
    """
    if info.size_bytes is None:
        raise ModelLoadFailed(info.problem or "The size of the model is not known.")
    dtype = load_dtype(info, options)
    weights = info.size_bytes
    if dtype in ITEM_BYTES and info.parameters and dtype != info.dtype:
        weights = info.parameters * ITEM_BYTES[dtype]
    config = read_object(Path(info.path) / "config.json")
    item_bytes = ITEM_BYTES.get(dtype, 2)
    if quantization(options) and info.parameters:
        # A byte each, and the embedding as it was: lookups need it.
        weights = info.parameters + item_bytes * _embedding(config)
    tokens, process = kv_tokens(info, options), PROCESS_BYTES
    if extra(options, "use_gpu", False) and extra(options, "cuda_graphs", True):
        tokens += BLOCK * (tokens // (context_limit(info, options) or tokens))  # what rows have for graphs to write to
        process += GRAPH_BYTES
    return MemoryNeed(weights, _kv_bytes(config, item_bytes, tokens), process)


def _kv_bytes(config: Mapping[str, Any], item_bytes: int, tokens: int) -> int:
    found = [section for section in sections(config) if _layers(section)]
    if not found:
        return 0
    section = found[-1]
    heads = _number(section, "num_attention_heads", "n_head", "num_heads") or 1
    width = _number(section, "hidden_size", "n_embd", "d_model") or 0
    per_layer = 2 * item_bytes * (_number(section, "num_key_value_heads", "num_kv_heads") or heads)
    per_layer *= _number(section, "head_dim", "d_kv") or width // heads
    return per_layer * _layers(section) * tokens


def _embedding(config: Mapping[str, Any]) -> int:
    """Elements of the largest embedding."""
    sizes = (_number(section, "vocab_size") or 0 for section in sections(config))
    widths = (_number(section, "hidden_size", "n_embd", "d_model") or 0 for section in sections(config))
    return max((size * width for size, width in zip(sizes, widths, strict=True)), default=0)


def _layers(section: Mapping[str, Any]) -> int:
    return _number(section, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0


def _number(section: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = section.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def gpu_bytes() -> int | None:
    """Memory that this process holds on its GPUs, freed blocks that torch keeps included; None when it uses none."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # a load may be in the midst of importing it
    if cuda is None or not getattr(cuda, "is_initialized", bool)():
        return None
    return sum(int(cuda.memory_reserved(device)) for device in range(cuda.device_count()))
