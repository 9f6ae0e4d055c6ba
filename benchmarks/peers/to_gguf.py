"""The benchmark models as f32 GGUF for llama.cpp; runs in llama.cpp's own environment (gguf, numpy, safetensors).

``python to_gguf.py FOLDER FILE``. llama.cpp knows no tokenizer of whole words; its SentencePiece one reads ``w123`` as
one token when ``▁w``, ``▁w1`` and ``▁w12`` are tokens too, so the vocabulary's last word gives its place to ``▁w``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = 8000
NORMAL = 1  # gguf.TokenType.NORMAL


def permuted(weights: Any, heads: int) -> Any:
    """Rows in the order of llama.cpp's rotary embedding, which pairs neighbours where transformers pairs halves."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def names(layers: int) -> dict[str, str]:
    """GGUF's tensor names by those of transformers."""
    found = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for layer in range(layers):
        for theirs, ours in parts.items():
            found[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    return found


def begun(file: str, config: Mapping[str, Any], words: int) -> Any:
    """A writer that knows a Llama's sizes; what is missing is its vocabulary."""
    import gguf

    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_vocab_size(words)
    writer.add_file_type(0)
    return writer


def ended(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Write the weights of a folder as float32, and close the file."""
    from safetensors.numpy import load_file

    tensors, heads = load_file(folder / "model.safetensors"), config["num_attention_heads"]
    for theirs, ours in names(config["num_hidden_layers"]).items():
        weights = tensors[theirs].astype("float32")
        writer.add_tensor(ours, permuted(weights, heads) if "attn_q" in ours or "attn_k" in ours else weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((folder / "config.json").read_text())
    writer = begun(out, config, WORDS)
    writer.add_tokenizer_model("llama")
    words = [f"▁w{number}" for number in range(WORDS - 1)] + ["▁w"]
    writer.add_token_list(words)
    writer.add_token_scores([float(len(word)) for word in words])
    writer.add_token_types([NORMAL] * WORDS)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(WORDS - 1)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    ended(writer, folder, config)


if __name__ == "__main__":
    main()
