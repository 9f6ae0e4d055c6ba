"""Training of ``tiny-chat``: one small Llama, stages of growing context, a mixture that follows the errors."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import random
import time
from collections.abc import Iterator

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models import chat_data, chat_tokenizer

LOGGER = logging.getLogger(__name__)

VOCABULARY = 512
WARM_UP_STEPS = 100
LOG_EVERY = 50

RESULT_WEIGHT = 3.0
FAR_DISTANCE = 200
TOKENS_PER_TURN = 40
# How often a kind of turn is drawn at least, relative to the others, however small its error has become.
BASE_SHARE = {
    "add": 0.6,
    "repeat": 0.3,
    "count": 0.3,
    "tell_name": 0.25,
    "ask_name": 0.35,
    "persona": 0.3,
    "unknown": 0.35,
    "greet": 0.1,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """How many conversations of how many tokens one step sees."""

    length: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps that take turns between some shapes."""

    shapes: tuple[Shape, ...]
    steps: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """Stages that share optimizers and one course of the learning rate.

    Attributes:
        stages: What the steps see, in order.
        peak_rate: Learning rate after the warm-up.
        falls: The steps at which the rate leaves the peak and would reach zero; none for a plateau to the end.
        far_share: Share of conversations that ask for a name only after many turns. If there are any, the tokens that
            decide such an answer weigh more.
        count_weights: Weight of the tokens inside a count and of its end. Counting writes by far the most tokens and is
            soon sure of most of them.
        rope_theta: Base of the rotary positions.
        small_sums: Share of sums that surely have a one-digit operand.
    """

    stages: tuple[Stage, ...]
    peak_rate: float
    falls: tuple[int, int] | None = None
    far_share: float = 0.0
    count_weights: tuple[float, float] = (0.25, 0.25)
    rope_theta: float = 10_000.0
    small_sums: float = 0.0

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def shapes(self) -> Iterator[Shape]:
        """The shape of every step."""
        for stage in self.stages:
            for step in range(stage.steps):
                yield stage.shapes[step % len(stage.shapes)]

    def rate(self, step: int) -> float:
        """Warm-up, a plateau, then a straight line down."""
        falling = (self.falls[1] - step) / (self.falls[1] - self.falls[0]) if self.falls else 1.0
        return self.peak_rate * min((step + 1) / WARM_UP_STEPS, 1.0, falling)


SHORT, MEDIUM, LONG, LONGER, LONGEST = Shape(128, 64), Shape(256, 32), Shape(512, 16), Shape(1024, 8), Shape(2048, 4)
# Short conversations first: copying is learned an order of magnitude sooner where there is little to choose from. The
# second phase meets the whole context, the third asks across it. The fourth turns the positions more slowly, which
# lets heads that learned to match contents over hundreds of tokens do so over thousands; the last mends small sums.
RECIPE = (
    Phase((Stage((SHORT,), 500), Stage((MEDIUM,), 1175)), peak_rate=4e-3),
    Phase((Stage((LONGEST, SHORT, LONGEST, MEDIUM), 601),), peak_rate=3e-3, falls=(270, 1800)),
    Phase(
        (Stage((LONG, LONGER, MEDIUM), 450), Stage((LONGEST, LONG, LONGEST, SHORT), 151)),
        peak_rate=3e-3,
        falls=(300, 1350),
        far_share=0.6,
        count_weights=(0.25, 2.0),
    ),
    Phase(
        (Stage((LONGEST, MEDIUM, LONG, SHORT), 800),),
        peak_rate=2.5e-3,
        falls=(80, 800),
        far_share=0.6,
        count_weights=(0.6, 0.6),
        rope_theta=100_000.0,
    ),
    Phase(
        (Stage((LONGEST, SHORT, MEDIUM, SHORT), 160),),
        peak_rate=8e-4,
        falls=(100, 160),
        far_share=0.6,
        count_weights=(0.6, 0.6),
        rope_theta=100_000.0,
        small_sums=0.5,
    ),
)


@dataclasses.dataclass
class Example:
    """One conversation as tokens, with the weight of each token in the loss and the answer that it belongs to."""

    tokens: list[int]
    weights: list[float]
    answers: list[int]
    kinds: list[str]


@dataclasses.dataclass
class Batch:
    """Examples of one length. ``answers`` numbers the answers of the whole batch; 0 stands for no answer."""

    tokens: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor
    kinds: list[str]


def configuration() -> LlamaConfig:
    """The architecture: a stock Llama with full attention and tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=chat_tokenizer.CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=chat_tokenizer.SPECIAL_TOKENS.index(chat_tokenizer.END),
        pad_token_id=chat_tokenizer.SPECIAL_TOKENS.index(chat_tokenizer.PAD),
    )


class Encoder:
    """Turns conversations into token ids, without the cost of rendering the template for every example."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._ids = {token: tokenizer.convert_tokens_to_ids(token) for token in chat_tokenizer.SPECIAL_TOKENS}
        self._equals = tokenizer.convert_tokens_to_ids("=")

    def message(self, role: str, text: str) -> list[int]:
        """The tokens of one message with its marks."""
        inner = self._encode(text, add_special_tokens=False).ids
        return [self._ids[chat_tokenizer.ROLE_TOKENS[role]], *inner, self._ids[chat_tokenizer.END]]

    def length(self, turn: chat_data.Turn) -> int:
        """How many tokens a turn takes."""
        return len(self.message("user", turn.user)) + len(self.message("assistant", turn.assistant))

    def answer_weights(self, kind: str, answer: list[int], distance: int, phase: Phase) -> list[float]:
        """Weight of every token of an answer; its role mark is given, so it weighs nothing.

        Args:
            kind: Kind of the turn.
            answer: Tokens of the answer.
            distance: Tokens since the name in it was mentioned last; 0 to weigh near and far alike.
            phase: What the weights depend on.
        """
        inside, end = phase.count_weights if kind == "count" else (1.0 + distance / FAR_DISTANCE,) * 2
        weights = [0.0] + [inside] * (len(answer) - 3) + [end] * 2
        if kind == "add":
            result = answer.index(self._equals) + 1
            weights[result:] = [RESULT_WEIGHT] * (len(answer) - result)
        return weights

    def example(self, rng: random.Random, share: dict[str, float], length: int, phase: Phase) -> Example:
        """Draw one training conversation that fills ``length + 1`` tokens; the last turn may be cut."""
        example = Example([], [], [], [])
        mentions = {"ask_name": 0, "persona": 0}

        def fits(turn: chat_data.Turn) -> bool:
            user, assistant = self.message("user", turn.user), self.message("assistant", turn.assistant)
            distance = len(example.tokens) - mentions[turn.kind] if phase.far_share and turn.kind in mentions else 0
            example.tokens.extend(user + assistant)
            example.weights.extend([0.0] * len(user) + self.answer_weights(turn.kind, assistant, distance, phase))
            example.kinds.append(turn.kind)
            example.answers.extend([0] * (len(user) + 1) + [len(example.kinds)] * (len(assistant) - 1))
            mentions["ask_name" if turn.kind == "tell_name" else turn.kind] = len(example.tokens)
            return len(example.tokens) <= length

        longest_count = min(chat_data.LONGEST_COUNT, max(8, (length - 40) // 4))
        # No draw where nothing is far, so that the earlier phases do not depend on this one.
        asks_late = phase.far_share and rng.random() < phase.far_share
        longest_quiet = length // TOKENS_PER_TURN if asks_late else 0
        conversation = chat_data.training_conversation(rng, share, fits, longest_count, longest_quiet, phase.small_sums)
        system = [] if conversation.system is None else self.message("system", conversation.system)
        example.tokens = (system + example.tokens)[: length + 1]
        example.weights = ([0.0] * len(system) + example.weights)[: length + 1]
        example.answers = ([0] * len(system) + example.answers)[: length + 1]
        return example


def draw_batch(encoder: Encoder, rng: random.Random, share: dict[str, float], shape: Shape, phase: Phase) -> Batch:
    """Draw the examples of one step."""
    examples = [encoder.example(rng, share, shape.length, phase) for _ in range(shape.batch)]
    kinds: list[str] = []
    answers = []
    for example in examples:
        answers.append([answer + len(kinds) if answer else 0 for answer in example.answers])
        kinds.extend(example.kinds)
    return Batch(
        torch.tensor([example.tokens for example in examples]),
        torch.tensor([example.weights for example in examples]),
        torch.tensor(answers),
        kinds,
    )


class Mixture:
    """How often each kind of turn is drawn: a base share and the running share of its answers that are wrong."""

    def __init__(self, keep: float = 0.97) -> None:
        self.errors = dict.fromkeys(chat_data.KINDS, 1.0)
        self._keep = keep

    def share(self) -> dict[str, float]:
        """Weights for the draw of the next batch."""
        return {kind: BASE_SHARE[kind] + self.errors[kind] ** 0.5 for kind in chat_data.KINDS}

    def update(self, batch: Batch, wrong: torch.Tensor) -> None:
        """Account for the answers of one batch; ``wrong`` marks the tokens that greedy decoding would miss."""
        wrong_answers = set((batch.answers[:, 1:] * wrong).unique().tolist())
        count, misses = dict.fromkeys(chat_data.KINDS, 0), dict.fromkeys(chat_data.KINDS, 0)
        for number, kind in enumerate(batch.kinds, start=1):
            count[kind] += 1
            misses[kind] += number in wrong_answers
        for kind in chat_data.KINDS:
            if count[kind]:
                self.errors[kind] = self._keep * self.errors[kind] + (1 - self._keep) * misses[kind] / count[kind]


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which learns such small models in fewer steps, AdamW for the rest."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_step(
    model: LlamaForCausalLM, batch: Batch, steppers: list[torch.optim.Optimizer]
) -> tuple[float, torch.Tensor]:
    """One update. Returns the loss and the mask of wrong tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.tokens[:, :-1], use_cache=False).logits
    logits, targets, weights = logits.float(), batch.tokens[:, 1:], batch.weights[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    return loss.item(), logits.detach().argmax(-1) != targets


def run(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    recipe: tuple[Phase, ...] = RECIPE,
    checkpoints: pathlib.Path | None = None,
) -> LlamaForCausalLM:
    """Train from scratch.

    Args:
        tokenizer: The tokenizer of the model.
        seed: Seed of the initial weights and of the conversations.
        recipe: Phases, in order.
        checkpoints: Folder that receives the weights after every phase, if any.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(configuration())
    LOGGER.info("%d parameters", model.num_parameters())
    for number, phase in enumerate(recipe, start=1):
        run_phase(model, tokenizer, phase, random.Random(seed + number))
        if checkpoints is not None:
            model.save_pretrained(checkpoints / f"phase-{number}")
    return model.eval()


def turn_positions(model: LlamaForCausalLM, rope_theta: float) -> None:
    """Set the base of the rotary positions."""
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)


def run_phase(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, rng: random.Random) -> None:
    """Train ``model`` for one phase, with fresh optimizers and a fresh mixture."""
    turn_positions(model, phase.rope_theta)
    encoder, mixture, steppers = Encoder(tokenizer), Mixture(), optimizers(model, phase.peak_rate)
    model.train()
    for step, shape in enumerate(phase.shapes()):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = phase.rate(step)
        batch = draw_batch(encoder, rng, mixture.share(), shape, phase)
        loss, wrong = train_step(model, batch, steppers)
        mixture.update(batch, wrong)
        if step % LOG_EVERY == 0:
            _report(step, phase, loss, mixture)


def _report(step: int, phase: Phase, loss: float, mixture: Mixture) -> None:
    errors = ", ".join(f"{kind} {error:.3f}" for kind, error in mixture.errors.items())
    seconds = time.process_time()
    LOGGER.info("step %d of %d, %.0f s, loss %.4f, wrong answers: %s", step, phase.steps, seconds, loss, errors)
