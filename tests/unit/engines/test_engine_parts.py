"""The small parts: waiting line, counters, fault table, memory need, images, registry."""

from __future__ import annotations

import errno
import io
import sys
from types import ModuleType
from typing import Any

import pytest
from PIL import Image as Pillow

from serve_app.domain.catalog import ModelInfo
from serve_app.domain.errors import (
    InvalidConfig,
    InvalidInput,
    ModelLoadFailed,
    QueueFull,
    UnsupportedMedia,
)
from serve_app.domain.generation import Image, Priority
from serve_app.engines import images, memory
from serve_app.engines.base import Counters, EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.faults import Stage, translate
from serve_app.engines.ledger import Ledger, Line, check_room
from serve_app.engines.pace import BLOCK
from serve_app.engines.registry import create
from tests.unit.engines.model_files import LLAMA, MakeModel


def test_the_line_goes_by_priority_then_age() -> None:
    line: Line[str] = Line()
    for name, priority, arrived in (
        ("a", Priority.LOW, 1.0),
        ("d", Priority.NORMAL, 3.0),
        ("b", Priority.NORMAL, 2.0),  # older than "d", but its prompt took longer to make
        ("c", Priority.HIGH, 4.0),
    ):
        line.push(name, priority, arrived)
    assert list(line) == ["c", "b", "d", "a"]
    assert line.remove("b") and not line.remove("b")
    assert (line.first(), [line.pop() for _ in range(3)], line.first()) == ("c", ["c", "d", "a"], None)


def test_the_line_refuses_one_too_many_with_a_time() -> None:
    options = EngineOptions(max_concurrency=2, max_queue=4)
    check_room(Counters(waiting=4, running=2), options)
    with pytest.raises(QueueFull) as refused:
        check_room(Counters(waiting=5, running=2), options)
    assert refused.value.retry_after_s == 2


def test_the_ledger_adds_up() -> None:
    ledger = Ledger()
    ledger.enter()
    ledger.enter()
    ledger.start()
    ledger.leave("running", "finished")
    ledger.leave("waiting", "cancelled")
    ledger.count(prompt_tokens=3, completion_tokens=2, tokens_after_cancel=1)
    expected = Counters(
        requests=2, finished=1, cancelled=1, prompt_tokens=3, completion_tokens=2, tokens_after_cancel=1
    )
    assert ledger.snapshot() == expected


def named(name: str, message: str = "", base: type[Exception] = Exception) -> Exception:
    """An exception of a library that this test must not import."""
    return type(name, (base,), {})(message)


FAULTS: list[tuple[BaseException, Stage, str, bool]] = [
    (MemoryError(), "load", "MEMORY_EXCEEDED", True),
    (named("OutOfMemoryError", "CUDA out of memory", RuntimeError), "generate", "MEMORY_EXCEEDED", True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "generate", "MEMORY_EXCEEDED", True),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "load", "MEMORY_EXCEEDED", True),
    (TimeoutError(), "generate", "TIMEOUT", False),
    (named("SafetensorError", "Error while deserializing header"), "load", "MODEL_LOAD_FAILED", False),
    (FileNotFoundError(errno.ENOENT, "No such file", "/secret/path"), "load", "MODEL_LOAD_FAILED", False),
    (PermissionError(errno.EACCES, "Permission denied", "/secret/path"), "load", "MODEL_LOAD_FAILED", False),
    (OSError(errno.EIO, "Input/output error"), "load", "MODEL_LOAD_FAILED", True),
    (OSError("We couldn't connect to 'https://huggingface.co'"), "load", "MODEL_LOAD_FAILED", False),
    (RuntimeError("size mismatch for lm_head.weight"), "load", "MODEL_LOAD_FAILED", False),
    (ImportError("requires torchvision"), "load", "MODEL_LOAD_FAILED", False),
    (ValueError("Transformers does not recognize this architecture"), "load", "MODEL_LOAD_FAILED", False),
    (Exception("tokenizer.json: expected value at line 1"), "load", "MODEL_LOAD_FAILED", False),
    (
        named("TemplateSyntaxError", "unexpected '%'", named("TemplateError").__class__),
        "prompt",
        "MODEL_LOAD_FAILED",
        False,
    ),
    (named("TemplateError", "roles must alternate"), "prompt", "INVALID_INPUT", False),
    (named("SecurityError", "access to attribute"), "prompt", "MODEL_LOAD_FAILED", False),
    (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "prompt", "INVALID_INPUT", False),
    (ZeroDivisionError("x"), "load", "MODEL_LOAD_FAILED", False),
    (ZeroDivisionError("x"), "prompt", "GENERATION_FAILED", False),
    (ZeroDivisionError("x"), "generate", "GENERATION_FAILED", False),
]


@pytest.mark.parametrize(("fault", "stage", "code", "retryable"), FAULTS)
def test_library_faults_are_told_in_our_words(fault: BaseException, stage: Stage, code: str, retryable: bool) -> None:
    error = translate(fault, stage)
    assert (error.code, error.retryable) == (code, retryable)
    assert not str(fault) or str(fault) not in error.message
    assert "/" not in error.message
    assert translate(fault, stage) is not error


def test_our_own_errors_pass() -> None:
    error = InvalidInput("no")
    assert translate(error, "load") is error


MIXED = ["sliding_attention", "full_attention"]


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cpu_has_bfloat16", lambda: False)


@pytest.mark.usefixtures("no_bfloat16")
@pytest.mark.parametrize(
    ("config", "options", "kv_cache"),
    [
        ({}, {}, 2 * 2 * 2 * 16 * 4 * 512 * 8),
        ({"head_dim": 32}, {}, 2 * 2 * 2 * 32 * 4 * 512 * 8),
        ({}, {"context_length": 64, "max_concurrency": 2}, 2 * 2 * 2 * 16 * 4 * 64 * 2),
        ({"max_position_embeddings": 40_000}, {}, 2 * 2 * 2 * 16 * 4 * 40_000),
        ({"max_position_embeddings": 8_192}, {}, 2 * 2 * 2 * 16 * 4 * 32_768),
        ({}, {"extra": (("kv_tokens", 1000),)}, 2 * 2 * 2 * 16 * 4 * 1000),
        ({"layer_types": MIXED, "sliding_window": 10}, {}, 2 * 2 * 2 * 16 * 4 * 512 * 8),  # rows keep all tokens
    ],
)
def test_memory_need_by_part(
    make_model: MakeModel, config: dict[str, Any], options: dict[str, Any], kv_cache: int
) -> None:
    info = inspect(make_model("m", files={"config.json": LLAMA | config}), "m")
    need = memory.needed_bytes(info, EngineOptions(**options))
    assert (need.weights, need.kv_cache, need.process) == (134, kv_cache, 400 * 1024 * 1024)
    assert need.total == sum(value for name, value in need.to_json().items() if name != "total")


def test_cuda_graphs_need_memory_and_a_place_more_in_each_row(make_model: MakeModel) -> None:
    info = inspect(make_model("m", files={"config.json": LLAMA}), "m")
    without = memory.needed_bytes(info, EngineOptions(extra=(("use_gpu", True), ("cuda_graphs", False))))
    need = memory.needed_bytes(info, EngineOptions(extra=(("use_gpu", True),)))
    assert need.kv_cache * 512 == without.kv_cache * (512 + BLOCK)
    assert need.process - without.process == memory.GRAPH_BYTES


@pytest.mark.parametrize(
    ("stored", "asked", "hardware", "gpu", "computed"),
    [
        ("bfloat16", "auto", False, False, "float32"),
        ("bfloat16", "auto", True, False, "bfloat16"),
        ("float16", "auto", True, False, "float32"),
        ("float16", "auto", False, True, "float16"),
        ("float32", "auto", False, False, "float32"),
        ("float32", "bfloat16", True, False, "bfloat16"),
        (None, "auto", True, False, "float32"),
    ],
)
def test_half_precision_is_kept_only_where_it_is_real(
    monkeypatch: pytest.MonkeyPatch, stored: str | None, asked: str, hardware: bool, gpu: bool, computed: str
) -> None:
    monkeypatch.setattr(memory, "cpu_has_bfloat16", lambda: hardware)
    options = EngineOptions(dtype=asked, extra=(("use_gpu", gpu),))
    assert memory.load_dtype(ModelInfo("m", "", dtype=stored), options) == computed


@pytest.mark.usefixtures("no_bfloat16")
def test_a_cast_scales_the_weights(make_model: MakeModel) -> None:
    path = make_model("m")
    info = ModelInfo("m", str(path), dtype="bfloat16", parameters=100, size_bytes=200, context_length=8)
    assert memory.needed_bytes(info, EngineOptions()).weights == 400
    with pytest.raises(ModelLoadFailed):
        memory.needed_bytes(ModelInfo("m", str(path)), EngineOptions())


def encoded(picture: Pillow.Image, kind: str = "PNG") -> Image:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return Image(f"image/{kind.lower()}", buffer.getvalue())


def test_images_become_rgb_over_white() -> None:
    assert images.open_image(encoded(Pillow.new("L", (3, 2), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert images.open_image(encoded(Pillow.new("RGBA", (3, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert images.open_image(encoded(Pillow.new("P", (3, 2)), "GIF")).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", encoded(Pillow.new("RGB", (9, 9))).data[:40]])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia):
        images.open_image(Image("image/png", data))


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 8)
    with pytest.raises(UnsupportedMedia, match="3 × 3"):
        images.open_image(encoded(Pillow.new("RGB", (3, 3))))
    with pytest.raises(InvalidInput):
        images.check_count(33)


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match=r"auto, .*scripted, transformers"):
        create("vllm", ModelInfo("m", ""), EngineOptions())


@pytest.mark.parametrize("names", [(), ("torch",)])
def test_memory_of_gpus_may_be_asked_for_before_torch_is_there_whole(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert memory.gpu_bytes() is None
