"""Servers that are not ours and speak OpenAI's protocol, with tiny-chat: both sides of a test know the same model, so
what is said here and there can be compared word by word.

llama.cpp's own server goes on with a reply that was begun; ``transformers serve`` begins it anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers import to_gguf
from deployments.ports import free_port
from tests.cluster import MODELS, ROOT, wait_until

TINY_CHAT = MODELS / "rotunda" / "tiny-chat"
CONTROL = 3  # gguf.TokenType


@contextmanager
def llama_cpp(home: Path, name: str) -> Iterator[str]:
    """The base URL of llama.cpp's server, which offers tiny-chat as ``name``."""
    file, port = home / f"{name}.gguf", free_port()
    write_gguf(TINY_CHAT, file)
    command = [sys.executable, "-m", "benchmarks.peers.llama_server", str(file), "--port", str(port), "--name", name]
    with _running(command, port, home / "llama_cpp.log") as url:
        yield url


@contextmanager
def transformers_serve(home: Path) -> Iterator[str]:
    """The base URL of ``transformers serve``, which offers tiny-chat by the path of its folder."""
    port, program = free_port(), str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(TINY_CHAT), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    (home / "hub").mkdir()  # it lists what the hub's cache holds, and fails without one
    with _running([*command, "--dtype", "float32"], port, home / "transformers.log") as url:
        yield url


@contextmanager
def _running(command: list[str], port: int, log_path: Path) -> Iterator[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(log_path.parent), "OMP_NUM_THREADS": "1"}
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or _is_ready(url), 180, what=log_path.stem)
        assert process.poll() is None, log_path.read_text()
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def write_gguf(folder: Path, file: Path) -> None:
    """A Llama with a byte-level BPE tokenizer, in GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    config = json.loads((folder / "config.json").read_text())
    writer = to_gguf.begun(str(file), config, config["vocab_size"])
    _write_tokenizer(writer, folder, config)
    to_gguf.ended(writer, folder, config)


def _write_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # single digits, words with the space before them: nearest to the model's own
    writer.add_token_list(words)
    writer.add_token_types([CONTROL if number in special else to_gguf.NORMAL for number in range(len(words))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
