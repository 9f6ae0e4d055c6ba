"""Servers that are not ours and speak OpenAI's protocol, with tiny-chat: both sides of a test know the same model, so
what is said here and there can be compared word by word.

llama.cpp's own server goes on with a reply that was begun; ``transformers serve`` begins it anew. The first comes as a
library, in the PyPI package ``xllamacpp``, so this module is also the program that runs it:
``python -m tests.openai_servers FILE PORT NAME``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import MODELS, ROOT, free_port, wait_until

TINY_CHAT = MODELS / "rotunda" / "tiny-chat"
SLOTS = 2
CONTROL, NORMAL = 3, 1  # gguf.TokenType
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of a Llama layer's weights: transformers' and GGUF's."""


@contextmanager
def llama_cpp(home: Path, name: str) -> Iterator[str]:
    """The base URL of llama.cpp's server, which offers tiny-chat as ``name``."""
    file, port = home / f"{name}.gguf", free_port()
    write_gguf(TINY_CHAT, file)
    command = [sys.executable, "-m", "tests.openai_servers", str(file), str(port), name]
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
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    _write_tokenizer(writer, folder, config)
    for name, weights in load_file(folder / "model.safetensors").items():
        writer.add_tensor(_name_of(name), _rows_of(name, weights.astype("float32"), heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # single digits, words with the space before them: nearest to the model's own
    writer.add_token_list(words)
    writer.add_token_types([CONTROL if number in special else NORMAL for number in range(len(words))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _name_of(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{PARTS[part]}.weight"


def _rows_of(name: str, weights: Any, heads: int) -> Any:
    """llama.cpp's rotary embedding pairs neighbours where transformers pairs halves: the rows in its order."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weights
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def serve(file: str, port: int, name: str) -> None:
    """Run llama.cpp's server until SIGTERM."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = file, {name}
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel = 2048 * SLOTS, SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(0.5):  # a handler runs between two waits
        pass
    del server


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
