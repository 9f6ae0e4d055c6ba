"""Train the models that Rotunda ships.

    python models/train.py chat|vision|all [--out DIR] [--seed N] [--minutes M]

Every recipe is seeded, runs on CPU and writes ordinary Hugging Face folders below ``--out``.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, only this file's own folder is importable
    sys.path.insert(0, str(ROOT))

LOGGER = logging.getLogger("models.train")
DEFAULT_OUT = ROOT / "models" / "huggingface" / "rotunda"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the models that Rotunda ships.")
    parser.add_argument("model", choices=("chat", "vision", "all"), help="what to train")
    parser.add_argument("--out", type=pathlib.Path, default=DEFAULT_OUT, help="folder that receives the model folders")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and initial weights")
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="shorten the chat recipe to about this many minutes of one core (accuracy drops; for smoke tests)",
    )
    parser.add_argument("--evaluate-only", action="store_true", help="only measure the folders already in --out")
    return parser.parse_args(argv)


def train_chat(arguments: argparse.Namespace) -> None:
    """Train and measure ``tiny-chat``."""
    from models import chat

    folder = arguments.out / "tiny-chat"
    if arguments.evaluate_only:
        scores = chat.evaluate(folder)
    else:
        scores = chat.train(folder, seed=arguments.seed, minutes=arguments.minutes)
    _report("tiny-chat", scores)


def train_vision(arguments: argparse.Namespace) -> None:
    """Train and measure the vision model."""
    from models import vision

    folder = arguments.out / "tiny-vision"
    scores = vision.evaluate(folder) if arguments.evaluate_only else vision.train(folder, seed=arguments.seed)
    _report("tiny-vision", scores)


def _report(name: str, scores: dict[str, float]) -> None:
    for metric, value in scores.items():
        LOGGER.info("%s %s: %.3f", name, metric, value)


def main(argv: list[str] | None = None) -> None:
    """Run the chosen recipes one after the other."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    arguments = parse_arguments(argv)
    if arguments.model in ("chat", "all"):
        train_chat(arguments)
    if arguments.model in ("vision", "all"):
        train_vision(arguments)


if __name__ == "__main__":
    main()
