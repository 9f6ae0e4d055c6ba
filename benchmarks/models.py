"""Random-weight Llamas of about 5, 30 and 90 million parameters (and of 1 billion in bfloat16, for GPUs), made locally;
speed does not ask what weights say.

``python -m benchmarks.models FOLDER [--sizes 5M 30M 90M]`` writes ``FOLDER/bench/<size>``: stock architectures in fp32
that end no reply by themselves, with a tokenizer of whole words (``w0`` … ``w7999``) and a chat template that adds
nothing, so that every server sees the same tokens. The same bytes every time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.arrivals import VOCABULARY

CONTEXT = 4096
SIZES: dict[str, dict[str, int]] = {
    "5M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6},
    "30M": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 10, "num_attention_heads": 7},
    "90M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11, "num_attention_heads": 12},
}
LARGE: dict[str, dict[str, int]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
"""In bfloat16."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "benchmarks" / "models"


def make_model(path: Path, sizes: dict[str, int], dtype: str = "float32") -> int:
    """Write one model to ``path``; returns its number of parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    heads = {"num_key_value_heads": sizes["num_attention_heads"]}
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, **(heads | sizes),
    )  # fmt: skip
    with torch.device("cuda" if sizes in LARGE.values() and torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(path)
    backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", chat_template=TEMPLATE)
    tokenizer.save_pretrained(path)
    return int(model.num_parameters())


def model_id(size: str) -> str:
    """The model's id in a store that :func:`ensure` filled."""
    return f"bench/{size}"


def ensure(sizes: list[str], store: Path = CACHE) -> Path:
    """A model store that holds these sizes; made once, in a process of its own that leaves no torch behind here."""
    lacking = [size for size in sizes if not (store / model_id(size) / "tokenizer_config.json").exists()]
    if lacking:
        import subprocess
        import sys

        command = [sys.executable, "-m", "benchmarks.models", str(store), "--sizes", *lacking]
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES, *LARGE], default=list(SIZES))
    given = parser.parse_args()
    for size in given.sizes:
        sizes, dtype = (SIZES[size], "float32") if size in SIZES else (LARGE[size], "bfloat16")
        parameters = make_model(given.store / model_id(size), sizes, dtype)
        print(f"{model_id(size)}: {parameters / 1e6:.1f} M parameters")  # noqa: T201


if __name__ == "__main__":
    main()
