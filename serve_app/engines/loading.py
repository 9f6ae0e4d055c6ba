"""Loading a model safely: no code and no pickles of its own, nothing from the network, no tensor left to chance."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.domain.catalog import ModelInfo, Task
from serve_app.domain.errors import CapabilityMissing, ModelLoadFailed, error_from_dict
from serve_app.engines.base import EngineOptions, Progress, no_progress
from serve_app.engines.discovery import inspect
from serve_app.engines.faults import translate
from serve_app.engines.memory import extra, load_dtype, quantization

log = logging.getLogger(__name__)

CLASSES = {
    Task.TEXT_GENERATION: "AutoModelForCausalLM",
    Task.TEXT2TEXT_GENERATION: "AutoModelForSeq2SeqLM",
    Task.IMAGE_TEXT_TO_TEXT: "AutoModelForImageTextToText",
}
SAFE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory. ``processor`` only where the model sees images; ``info`` as the loaded model completes it."""

    model: Any
    tokenizer: Any
    processor: Any | None
    info: ModelInfo
    device: str
    dtype: str
    attention: str
    quantized: str | None = None


def load(
    info: ModelInfo,
    options: EngineOptions,
    on_progress: Progress = no_progress,
    classes: Mapping[Task, str] = CLASSES,
) -> Loaded:
    """Look at the files once more, then load them. Blocks.

    ``extra``: ``use_gpu`` (false) puts the model on the GPUs, if there are any. ``classes``: the tasks that the caller
    can do, each with the transformers class for it.

    Raises:
        ModelUnsafe, CapabilityMissing, ModelLoadFailed: the files say so.
        ModelLoadFailed: loading failed; ``retryable`` when that may heal by itself.
        MemoryExceeded: it does not fit.
    """
    _check_again(info, classes)
    try:
        return _load(info, options, on_progress, classes)
    except Exception as fault:  # the border to the libraries: whatever they raise becomes one of ours
        log.exception("loading %s failed", info.id)
        raise translate(fault, "load") from None


def _check_again(info: ModelInfo, classes: Mapping[Task, str]) -> None:
    path = Path(info.path)
    depth = 3 if path.parent.name == "snapshots" else info.id.count("/") + 1
    now = inspect(path, info.id, info.task, store=path.parents[min(depth, len(path.parents)) - 1])
    if now.problem is not None:
        raise error_from_dict({"code": now.problem_code, "message": now.problem})
    if info.revision and now.revision != info.revision:
        raise ModelLoadFailed("The model's files have just changed. Try again.", retryable=True)
    if info.task not in classes:
        able = ", ".join(task.value for task in classes)
        raise CapabilityMissing(f"This engine is for {able}; the model is for {info.task or 'something unknown'}.")


def _load(info: ModelInfo, options: EngineOptions, on_progress: Progress, classes: Mapping[Task, str]) -> Loaded:
    on_progress("import", 0.0)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    set_threads(torch, options.threads)
    on_progress("import", 1.0)
    on_progress("weights", 0.0)
    dtype = load_dtype(info, options)
    device = "cuda" if extra(options, "use_gpu", False) and torch.cuda.is_available() else "cpu"
    placement = {"device_map": "auto" if torch.cuda.device_count() > 1 else {"": 0}} if device == "cuda" else {}
    if device == "cuda":
        # It prepares itself anew for every shape, and no two pieces of prompts have the same.
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch_dtype = "auto" if info.quantization else getattr(torch, dtype)
    factory = getattr(transformers, classes[info.task or Task.TEXT_GENERATION])
    model, attention = _weights(factory, info.path, dtype=torch_dtype, **placement)
    tokenizer, processor = _text_side(transformers, info)
    model.eval()
    if (kind := quantization(options)) is not None:
        quantize(model, kind)
    on_progress("weights", 1.0)
    return Loaded(model, tokenizer, processor, _completed(info, model), device, dtype, attention, kind)


def quantize(model: Any, kind: str) -> None:
    """Hold the weights of a model's linear layers as "int8" with a scale for each row; arithmetic stays as it was.

    Raises:
        CapabilityMissing: the package torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise CapabilityMissing(
            f"Weights in {kind} need the package torchao. Install rotunda with the extra int8."
        ) from None
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))


def _weights(factory: Any, path: str, **settings: Any) -> tuple[Any, str]:
    """The model, and the attention it got: ``sdpa`` where it can, else ``eager``."""
    for attention in ("sdpa", "eager"):
        try:
            model, report = factory.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, attn_implementation=attention, **SAFE, **settings
            )
        except ValueError as fault:
            if attention == "sdpa" and "attention" in str(fault).lower():
                continue
            raise
        check_report(report)
        return model, attention
    raise AssertionError("unreachable: the last attempt returns or raises")


def check_report(report: Mapping[str, Any]) -> None:
    """Refuse a model of which tensors are missing: transformers fills them with random numbers.

    Tied weights do not count as missing; the report already leaves them out.

    Raises:
        ModelLoadFailed: not retryable.
    """
    missing, wrong = report.get("missing_keys") or (), report.get("mismatched_keys") or ()
    if missing:
        raise ModelLoadFailed(f"The weights lack {len(missing)} tensors of the model. Download the model again, whole.")
    if wrong or report.get("error_msgs"):
        raise ModelLoadFailed("The model's weights do not have the shapes that its configuration says.")


def _text_side(transformers: Any, info: ModelInfo) -> tuple[Any, Any | None]:
    if info.task is not Task.IMAGE_TEXT_TO_TEXT:
        return transformers.AutoTokenizer.from_pretrained(info.path, **SAFE), None
    processor = transformers.AutoProcessor.from_pretrained(info.path, **SAFE)
    return processor.tokenizer, processor


def set_threads(torch: Any, threads: int) -> None:
    """Compute with ``threads``; operations never run beside each other (they would fight for the same cores)."""
    torch.set_num_threads(max(1, threads))
    try:
        torch.set_num_interop_threads(1)
    except RuntimeError:  # may be set once, before the first parallel work; a second model in a process finds it set
        if torch.get_num_interop_threads() != 1:
            warnings.warn("torch's interop threads were set elsewhere", stacklevel=2)


def _completed(info: ModelInfo, model: Any) -> ModelInfo:
    """``info`` with the context length that only the configuration's class knows (files leave defaults out)."""
    if info.context_length is not None:
        return info
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return replace(info, context_length=limit) if isinstance(limit, int) and limit > 0 else info
