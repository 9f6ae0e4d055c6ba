"""What is found in a model store, and what is refused, from files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from serve_app.domain.catalog import Capability, ModelInfo, Task
from serve_app.engines.discovery import ModelStore, discover, inspect
from tests.unit.engines.model_files import LLAMA, WEIGHTS, MakeModel, safetensors

INDEX = "model.safetensors.index.json"
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
WHISPER = {"architectures": ["WhisperForConditionalGeneration"], "num_mel_bins": 80}
SENTENCES = [{"type": "sentence_transformers.models.Pooling"}]


def only(root: Path, **settings: Any) -> ModelInfo:
    (info,) = discover(root, **settings)
    return info


def test_a_folder_tells_what_the_model_is(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("org/name", files={"tokenizer_config.json": {"chat_template": "{{ messages }}"}})
    info = only(tmp_path)
    assert (info.id, info.path, info.problem) == ("org/name", str(tmp_path / "org/name"), None)
    assert (info.task, info.architecture) == (Task.TEXT_GENERATION, "LlamaForCausalLM")
    assert (info.parameters, info.size_bytes, info.dtype, info.context_length) == (35, 134, "float32", 512)
    assert info.capabilities == {Capability.CHAT, Capability.COMPLETION, Capability.CHAT_TEMPLATE}
    assert len(info.revision) == 16 and info.usable


def test_layouts_live_side_by_side_and_strangers_are_ignored(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("bare")
    make_model("org/name")
    hub(tmp_path, make_model, "models--hub--one")
    hub(tmp_path, make_model, "models--gpt2")
    (tmp_path / "empty/deeper/still").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "datasets--x--y/snapshots").mkdir(parents=True)
    assert [info.id for info in discover(tmp_path)] == ["bare", "gpt2", "hub/one", "org/name"]
    assert all(info.usable for info in discover(tmp_path))


def hub(root: Path, make_model: MakeModel, name: str, revision: str = "abc", **files: Any) -> Path:
    """A repository of the hub cache: blobs, a snapshot of links to them, refs/main."""
    repository = root / name
    blobs = make_model(f"{name}/blobs", **files)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for blob in sorted(blobs.iterdir()):
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text(f"{revision}\n")
    return snapshot


def test_refs_main_chooses_the_snapshot(tmp_path: Path, make_model: MakeModel) -> None:
    hub(tmp_path, make_model, "models--org--name", "old")
    (tmp_path / "models--org--name/snapshots/new").mkdir()
    assert only(tmp_path).path.endswith("snapshots/old")
    (tmp_path / "models--org--name/refs/main").write_text("gone")
    assert "refs/main" in (only(tmp_path).problem or "")


def test_an_unfinished_download_says_so(tmp_path: Path, make_model: MakeModel) -> None:
    snapshot = hub(tmp_path, make_model, "models--org--name")
    blob = tmp_path / "models--org--name/blobs/123.incomplete"
    blob.write_bytes(b"")
    assert only(tmp_path).problem_code == "MODEL_LOAD_FAILED"
    assert "not finished" in (only(tmp_path).problem or "")
    blob.unlink()
    assert only(tmp_path).usable
    (snapshot / "extra.json").symlink_to("../../blobs/absent")
    assert "not finished" in (only(tmp_path).problem or "")


def test_a_local_download_in_progress_is_noticed(tmp_path: Path, make_model: MakeModel) -> None:
    progress = make_model("org/name") / ".cache/huggingface/download"
    progress.mkdir(parents=True)
    (progress / "abc.incomplete").write_bytes(b"")
    assert "not finished" in (only(tmp_path).problem or "")


def sharded(weight_map: Any, **shards: Any) -> dict[str, Any]:
    return {"model.safetensors": None, INDEX: {"weight_map": weight_map}} | shards


def test_shards_are_summed_up(tmp_path: Path, make_model: MakeModel) -> None:
    one, two = safetensors({"a": ("F16", [5], 10)}), safetensors({"b": ("F16", [7], 14)})
    files = sharded({"a": "m-1.safetensors", "b": "m-2.safetensors"})
    make_model("m", files=files | {"m-1.safetensors": one, "m-2.safetensors": two})
    assert (only(tmp_path).parameters, only(tmp_path).size_bytes, only(tmp_path).dtype) == (12, 24, "float16")


@pytest.mark.parametrize(
    ("weight_map", "code", "words"),
    [
        ({"a": "m-1.safetensors", "c": "m-9.safetensors"}, "MODEL_LOAD_FAILED", "1 of 2 weight files are missing"),
        ({"z": "m-1.safetensors"}, "MODEL_LOAD_FAILED", "lacks 1 tensors"),
        ({"a": "../other/model.safetensors"}, "MODEL_UNSAFE", "bare"),
        ({"a": "/etc/passwd"}, "MODEL_UNSAFE", "bare"),
        ({"a": "..\\m.safetensors"}, "MODEL_UNSAFE", "bare"),
        ({"a": ".."}, "MODEL_UNSAFE", "bare"),
        ({"a": "m.bin"}, "MODEL_UNSAFE", "bare"),
        ({"a": 7}, "MODEL_UNSAFE", "bare"),
        ({"a": ["m-1.safetensors"]}, "MODEL_UNSAFE", "bare"),
        ({}, "MODEL_LOAD_FAILED", "weight_map"),
        ("m-1.safetensors", "MODEL_LOAD_FAILED", "weight_map"),
    ],
)
def test_an_index_may_only_name_whole_files_of_its_folder(
    tmp_path: Path, make_model: MakeModel, weight_map: Any, code: str, words: str
) -> None:
    make_model("m", files=sharded(weight_map) | {"m-1.safetensors": WEIGHTS})
    assert only(tmp_path).problem_code == code
    assert words in (only(tmp_path).problem or "")


def test_a_link_out_of_the_store_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    store, outside = tmp_path / "store", tmp_path / "outside"
    path = make_model("store/a/file")
    make_model("store/b/shared", files={"tokenizer.json": None})
    make_model("outside/model")
    (path / "notes.txt").symlink_to("/etc/hostname")
    (store / "b/folder").symlink_to(outside / "model")
    (store / "c").symlink_to(outside)
    (store / "b/shared/tokenizer.json").symlink_to(path / "tokenizer.json")
    found = {info.id: info for info in discover(store)}
    assert {model_id for model_id, info in found.items() if info.problem_code == "MODEL_UNSAFE"} == {
        "a/file",
        "b/folder",
        "c",
    }
    assert found["b/shared"].usable
    assert not inspect(store / "b/shared", "b/shared").usable


def test_weights_behind_a_link_must_stay_in_the_folder(tmp_path: Path, make_model: MakeModel) -> None:
    path = make_model("m/one")
    two = make_model("m/two", files={"model.safetensors": None})
    (two / "model.safetensors").symlink_to(path / "model.safetensors")
    assert [info.problem_code for info in discover(tmp_path)] == [None, "MODEL_UNSAFE"]


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "MODEL_UNSAFE", "pickle"),
        ({"model.safetensors": None, "weights.pt": b"x"}, "MODEL_UNSAFE", "pickle"),
        ({"model.safetensors": None, "model.gguf": b"x"}, "MODEL_LOAD_FAILED", "no safetensors"),
        ({"model.safetensors": None, "consolidated.safetensors": WEIGHTS}, "MODEL_LOAD_FAILED", "neither"),
        ({"model.safetensors": WEIGHTS[:-3]}, "MODEL_LOAD_FAILED", "truncated"),
        ({"config.json": LLAMA | {"auto_map": {"AutoModel": "m.M"}}}, "MODEL_UNSAFE", "auto_map"),
        ({"config.json": LLAMA | {"text_config": {"auto_map": {"A": "m.M"}}}}, "MODEL_UNSAFE", "auto_map"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.T", None]}}}, "MODEL_UNSAFE", "auto_map"),
        ({"preprocessor_config.json": {"auto_map": {"A": "p.P"}}}, "MODEL_UNSAFE", "auto_map"),
        ({"generation_config.json": {"trust_remote_code": True}}, "MODEL_UNSAFE", "code"),
        ({"custom_generate/generate.py": "print(1)"}, "MODEL_UNSAFE", "generation code"),
        ({"modules.json": [{"type": "custom.Module"}]}, "MODEL_UNSAFE", "modules.json"),
        ({"adapter_config.json": {"base_model_name_or_path": "other/base"}}, "MODEL_UNSAFE", "adapter"),
        ({"chat_template.jinja": "x" * 65_537}, "MODEL_UNSAFE", "chat template"),
        ({"tokenizer_config.json": {"chat_template": [{"template": "x" * 65_537}]}}, "MODEL_UNSAFE", "chat template"),
        ({"config.json": "{"}, "MODEL_LOAD_FAILED", "not valid JSON"),
        ({"config.json": "[" * 200_000}, "MODEL_LOAD_FAILED", "not valid JSON"),
        ({"config.json": b"\xff\xfe\x00"}, "MODEL_LOAD_FAILED", "not valid JSON"),
        ({"config.json": "[]"}, "MODEL_LOAD_FAILED", "JSON object"),
        ({"config.json": " " * (16 * 1024 * 1024 + 1)}, "MODEL_LOAD_FAILED", "larger than"),
        ({"config.json": None}, "MODEL_LOAD_FAILED", "no config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "MODEL_LOAD_FAILED", "no tokenizer"),
        ({"config.json": {}}, "CAPABILITY_MISSING", "HF_DEFAULT_TASK"),
        ({"config.json": {"architectures": ["BertForTokenClassification"]}}, "CAPABILITY_MISSING", "neither"),
        ({"config.json": WHISPER}, "CAPABILITY_MISSING", "audio"),
        ({"config.json": LLAVA}, "MODEL_LOAD_FAILED", "image processor"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_listed_with_the_reason(
    tmp_path: Path, make_model: MakeModel, files: dict[str, Any], code: str, words: str
) -> None:
    make_model("bad", files=files)
    make_model("good")
    bad, good = discover(tmp_path)
    assert good.usable
    assert bad.problem_code == code and words in (bad.problem or "")
    assert str(tmp_path) not in (bad.problem or "")


@pytest.mark.parametrize(
    ("config", "more", "task"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, {}, Task.TEXT_GENERATION),
        ({"architectures": ["T5ForConditionalGeneration"]}, {}, Task.TEXT2TEXT_GENERATION),
        (LLAVA, {"preprocessor_config.json": {"a": 1}}, Task.IMAGE_TEXT_TO_TEXT),
        ({"architectures": ["BertModel"]}, {}, Task.FEATURE_EXTRACTION),
        ({"architectures": ["BertForMaskedLM"]}, {"modules.json": SENTENCES}, Task.FEATURE_EXTRACTION),
        ({}, {"README.md": "---\nlicense: mit\npipeline_tag: text-generation\n---\n# Hello"}, Task.TEXT_GENERATION),
    ],
)  # fmt: skip
def test_the_task_comes_from_the_files(
    tmp_path: Path, make_model: MakeModel, config: dict[str, Any], more: dict[str, Any], task: Task
) -> None:
    make_model("m", files={"config.json": config} | more)
    assert (only(tmp_path).task, only(tmp_path).problem) == (task, None)


def test_the_default_task_fills_a_gap_and_no_more(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("a", files={"config.json": {}})
    make_model("b", files={"config.json": {"architectures": ["T5ForConditionalGeneration"]}})
    found = discover(tmp_path, Task.TEXT_GENERATION)
    assert [info.task for info in found] == [Task.TEXT_GENERATION, Task.TEXT2TEXT_GENERATION]


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"thinker_config": {"text_config": {"max_position_embeddings": 64}}}, 64),
        ({"max_position_embeddings": "many"}, 777),
        ({"max_position_embeddings": -1}, 777),
    ],
)
def test_the_context_is_found_where_models_keep_it(
    tmp_path: Path, make_model: MakeModel, config: dict[str, Any], context: int
) -> None:
    files = {
        "config.json": {"architectures": ["AForCausalLM"]} | config,
        "tokenizer_config.json": {"model_max_length": 777},
    }
    make_model("m", files=files)
    assert only(tmp_path).context_length == context


def test_an_embedding_model_says_what_it_was_trained_for(tmp_path: Path, make_model: MakeModel) -> None:
    files = {
        "config.json": {"architectures": ["BertModel"], "max_position_embeddings": 512},
        "modules.json": [{"type": "sentence_transformers.models.Transformer"}],
        "sentence_bert_config.json": {"max_seq_length": 256},
    }
    make_model("m", files=files)
    assert only(tmp_path).context_length == 256
    assert only(tmp_path).capabilities == {Capability.EMBEDDINGS}


def test_quantised_weights_are_named(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("m", files={"config.json": LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}})
    assert (only(tmp_path).quantization, only(tmp_path).parameters) == ("gptq-4bit", None)


def test_pictures_that_need_torchvision_are_reported(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": {}}
    make_model("m", files={"config.json": config, "preprocessor_config.json": {"image_processor_type": "X"}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "torchvision" in (only(tmp_path).problem or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert only(tmp_path).usable and Capability.VISION in only(tmp_path).capabilities


def test_a_stray_file_hides_no_model(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("org/name", files={"1_Pooling/config.json": {}})
    (tmp_path / "org/config.json").write_text("{}")
    assert [(info.id, info.usable) for info in discover(tmp_path)] == [("org", False), ("org/name", True)]


def test_of_two_folders_with_one_id_the_usable_one_counts(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("org/name", files={"config.json": None})
    hub(tmp_path, make_model, "models--org--name")
    assert only(tmp_path).usable


def test_a_fault_of_the_file_system_is_reported(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("m")

    def broken(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("serve_app.engines.discovery.read_header", broken)
    assert "Permission denied" in (only(tmp_path).problem or "")
    assert str(tmp_path) not in (only(tmp_path).problem or "")


def test_a_pipe_in_a_folder_does_not_stop_the_scan(tmp_path: Path, make_model: MakeModel) -> None:
    os.mkfifo(make_model("m", files={"config.json": None}) / "config.json")
    assert "config.json is missing" in (only(tmp_path).problem or "")


def test_names_that_are_no_text_can_still_be_shown(tmp_path: Path, make_model: MakeModel) -> None:
    os.rename(make_model("m"), os.fsencode(tmp_path) + b"/m\xff")
    json.dumps(only(tmp_path).id).encode("utf-8")


def test_discovery_imports_no_torch() -> None:
    code = "import sys, serve_app.engines.discovery, serve_app.engines.memory, serve_app.engines.registry as r; "
    code += "r.create; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The store that is looked at again and again


def test_a_folder_at_rest_is_offered_at_once(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("m")
    assert [info.id for info in ModelStore(tmp_path).scan(time.time() + 5)] == ["m"]


def test_a_new_folder_is_offered_when_nothing_has_changed_for_so_long(tmp_path: Path, make_model: MakeModel) -> None:
    store = ModelStore(tmp_path, settle_s=2.0)
    assert store.scan(now=0.0) == []
    path = make_model("m")
    assert store.scan(now=10.0) == []
    assert store.scan(now=11.9) == []
    (path / "more.txt").write_text("x")
    assert store.scan(now=12.1) == []
    assert store.scan(now=14.0) == []
    assert [info.id for info in store.scan(now=14.1)] == ["m"]


def test_a_changed_model_gets_a_new_revision_and_never_vanishes_meanwhile(
    tmp_path: Path, make_model: MakeModel
) -> None:
    path = make_model("m")
    store = ModelStore(tmp_path)
    (before,) = store.scan(now=2e9)
    os.utime(path / "config.json", ns=(1, 1))
    assert store.scan(now=2e9 + 1) == [before]
    (after,) = store.scan(now=2e9 + 3)
    assert after.revision != before.revision
    assert ModelStore(tmp_path).scan(now=2e9) == [after]


def test_a_folder_that_goes_is_gone(tmp_path: Path, make_model: MakeModel) -> None:
    path = make_model("m")
    store = ModelStore(tmp_path)
    assert len(store.scan(now=2e9)) == 1
    path.rename(tmp_path / ".trash")
    assert store.scan(now=2e9 + 1) == []


def test_a_finished_download_becomes_usable(tmp_path: Path, make_model: MakeModel) -> None:
    path = make_model("m", files={"model.safetensors": WEIGHTS[:-1]})
    store = ModelStore(tmp_path)
    assert [info.usable for info in store.scan(now=2e9)] == [False]
    (path / "model.safetensors").write_bytes(WEIGHTS)
    store.scan(now=2e9 + 1)
    assert [info.usable for info in store.scan(now=2e9 + 3)] == [True]


def test_a_store_that_is_not_there_holds_nothing_until_it_comes(tmp_path: Path, make_model: MakeModel) -> None:
    store = ModelStore(tmp_path / "later")
    assert store.scan(now=0.0) == []
    make_model("later/m")
    assert [info.id for info in store.scan(now=2e9)] == ["m"]


def test_a_store_that_is_away_for_a_while_says_so_and_loses_no_model(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("store/m")
    root = tmp_path / "store"
    store = ModelStore(root)
    before = store.scan(now=2e9)
    assert [info.id for info in before] == ["m"] and store.problem is None
    root.rename(tmp_path / "elsewhere")
    assert store.scan(now=2e9 + 10) == before
    assert store.problem == f"The model store {root} cannot be listed (No such file or directory)."
    root.write_text("a file")
    assert store.scan(now=2e9 + 20) == before
    assert store.problem == f"The model store {root} cannot be listed (Not a directory)."
    root.unlink()
    (tmp_path / "elsewhere").rename(root)
    assert store.scan(now=2e9 + 30) == before and store.problem is None


def test_a_scan_reads_nothing_that_has_not_changed(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        make_model(f"org/m{number}")
    store = ModelStore(tmp_path)
    before = store.scan(now=2e9)
    monkeypatch.setattr("serve_app.engines.discovery._inspect", lambda *args: pytest.fail("a folder was read again"))
    assert store.scan(now=2e9 + 1) == before


def test_the_clock_may_go_back(tmp_path: Path, make_model: MakeModel) -> None:
    make_model("m")
    store = ModelStore(tmp_path)
    assert store.scan(now=100.0) == []
    assert store.scan(now=50.0) == []
    assert len(store.scan(now=52.0)) == 1
