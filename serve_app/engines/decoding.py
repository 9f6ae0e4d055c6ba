"""Forward passes of a transformers model as ``generate`` makes them, over one text or several.

The steps are those of ``generate`` (``prepare_inputs_for_generation``, forward, update of the cache and masks), so that
what works there works here; but one token at a time, and free to stop anywhere. Texts of different lengths are padded:
on the left, and on the right where an encoder reads them, since its positions count from the left.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from serve_app.domain.errors import InvalidInput
from serve_app.engines.loading import Loaded
from serve_app.engines.sampling import Sampler
from serve_app.engines.worker import Job

CANARY_TOKENS = 4
CANARY_TOLERANCE = 0.05
"""Of the logits' standard deviation."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A text to go on with: a prompt, what there is of the reply, and what else a first pass takes (``pixel_values``
    and the like)."""

    ids: Sequence[int]
    reply: Sequence[int] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> Begun:
        return cls(job.prompt.ids, job.tokens, job.prompt.inputs)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Texts of one shape can be read in one pass."""
        kinds = [
            (name, None if self.tells_of_tokens(value) else tuple(value.shape[1:]))
            for name, value in sorted(self.inputs.items())
        ]
        return (len(self.reply), *kinds)

    def tells_of_tokens(self, value: Any) -> bool:
        """Whether an input says something about each token, as ``token_type_ids`` do."""
        return tuple(value.shape) == (1, len(self.ids))


class Passes:
    """A model's passes, and what a decoder must know of the model.

    ``cached``: whether keys and values are kept between passes.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._model = loaded.model
        self._config = loaded.model.config
        self._device = loaded.model.device
        self._vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
        self._defaults = loaded.model.generation_config
        self._ends = end_tokens(loaded, self._vocabulary)
        takes = inspect.signature(loaded.model.forward).parameters
        self._prefill_extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cached = True
        # Qwen-VL and its kin keep the positions of the last prompt's images on the model itself.
        self.keeps_state = any(hasattr(module, "rope_deltas") for module in loaded.model.modules())

    def ends(self, token: int) -> bool:
        """Whether the token ends a reply."""
        return token in self._ends

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ``InvalidInput`` for ids that the model has no embedding for."""
        if max(ids) >= self._vocabulary:
            raise InvalidInput("The prompt holds a token that the model does not know.")

    def sampler(self, job: Job) -> Sampler:
        return Sampler.of(job, self._defaults, tuple(self._ends), len(self._begin(job.prompt.ids)), self._device)

    def decoder_ids(self, job: Job) -> list[int]:
        """What the decoder has read for a job."""
        return [*self._begin(job.prompt.ids), *job.tokens]

    def _begin(self, ids: Sequence[int]) -> list[int]:
        """What the decoder reads before the reply: the prompt, or the start token where an encoder reads the prompt."""
        return [self._start_token()] if self._config.is_encoder_decoder else list(ids)

    def _start_token(self) -> int:
        token = self._defaults.decoder_start_token_id
        return int(token if token is not None else self._config.decoder_start_token_id or 0)

    def first(self, texts: Sequence[Begun]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The logits ``[texts, vocabulary]`` after texts of one :attr:`Begun.shape`, and the arguments of the next
        pass."""
        return self._forward(*self._first_arguments(texts), first=True)

    def next(self, tokens: Sequence[int], arguments: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """As :meth:`first`, after one more token of each."""
        return self._forward(torch.tensor(tokens, device=self._device)[:, None], arguments, first=False)

    def _first_arguments(self, texts: Sequence[Begun]) -> tuple[torch.Tensor, dict[str, Any]]:
        right = bool(self._config.is_encoder_decoder)
        read = [text.ids if right else (*text.ids, *text.reply) for text in texts]
        width = max(map(len, read))
        tokens = torch.tensor([padded(ids, width, right) for ids in read], device=self._device)
        mask = torch.tensor([padded([1] * len(ids), width, right) for ids in read], device=self._device)
        arguments: dict[str, Any] = {"use_cache": self.cached, "attention_mask": mask}
        for name, value in joined(texts, width).items():
            arguments[name] = value.to(self._device)
            if value.is_floating_point():
                arguments[name] = arguments[name].to(self._model.dtype)
        if right:
            encoder = self._model.get_encoder()
            arguments["encoder_outputs"] = encoder(tokens, attention_mask=mask, return_dict=True)
            tokens = torch.tensor([[*self._begin(text.ids), *text.reply] for text in texts], device=self._device)
        return tokens, arguments

    def _forward(
        self, tokens: torch.Tensor, arguments: dict[str, Any], first: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        prepared = self._model.prepare_inputs_for_generation(
            tokens, is_first_iteration=first, next_sequence_length=None if first else 1, **arguments
        )
        outputs = self._model(**(prepared | (self._prefill_extra if first else {})), return_dict=True)
        following = self._model._update_model_kwargs_for_generation(
            outputs, arguments, is_encoder_decoder=self._config.is_encoder_decoder
        )
        return outputs.logits[:, -1], following

    def check(self, ids: Sequence[int]) -> bool:
        """Whether a few likeliest tokens come out alike with the cache and without; also warms the model up."""
        return self._alike([ids])

    def check_padding(self, ids: Sequence[int]) -> bool:
        """Whether texts of different lengths may share passes."""
        return self._alike([ids, ids[: max(1, len(ids) // 3)], [*ids, *ids]])

    def _alike(self, texts: Sequence[Sequence[int]]) -> bool:
        with torch.inference_mode():
            chosen: list[list[int]] = [[] for _ in texts]
            logits, arguments = self.first([Begun(ids) for ids in texts])
            for _ in range(CANARY_TOKENS):
                for ids, reply, row in zip(texts, chosen, logits, strict=True):
                    reference = self.reread(Begun(ids, reply)).float()
                    reply.append(int(row.argmax()))
                    # Two ways of rounding may choose either of two tokens that are as good as equally likely.
                    if reference.max() - reference[reply[-1]] > CANARY_TOLERANCE * reference.std():
                        return False
                logits, arguments = self.next([reply[-1] for reply in chosen], arguments)
        return True

    def reread(self, text: Begun) -> torch.Tensor:
        """The logits ``[vocabulary]`` after a text, from one pass over all of it that fills no cache."""
        with torch.inference_mode():
            tokens, arguments = self._first_arguments([text])
            logits, _ = self._forward(tokens, arguments | {"use_cache": False}, first=True)
            return logits[0]


def padded(ids: Sequence[int], width: int, right: bool) -> list[int]:
    """With zeros on one side, up to ``width``."""
    zeros = [0] * (width - len(ids))
    return [*ids, *zeros] if right else [*zeros, *ids]


def joined(texts: Sequence[Begun], width: int) -> dict[str, torch.Tensor]:
    """The inputs of texts of one shape for a pass over all of them, padded to ``width`` like their ids."""
    found = {}
    for name in texts[0].inputs:
        values = [text.inputs[name] for text in texts]
        if texts[0].tells_of_tokens(values[0]):  # what is not of the prompt is text, whose kind is 0
            after = [len(text.reply) for text in texts]
            values = [
                torch.nn.functional.pad(value, (width - more - value.shape[1], more))
                for value, more in zip(values, after, strict=True)
            ]
        found[name] = torch.cat(values)
    return found


def end_tokens(loaded: Loaded, vocabulary: int) -> frozenset[int]:
    """The tokens that end a reply: those of the generation config, and the tokenizer's.

    The tokenizer's are added because many chat models name their end of turn only there. Whatever is no token of the
    vocabulary (None, -1, a number beyond it) is left out.
    """
    said = loaded.model.generation_config.eos_token_id
    listed = said if isinstance(said, (list, tuple)) else [said]
    found = {token for token in (*listed, loaded.tokenizer.eos_token_id) if type(token) is int}
    return frozenset(token for token in found if 0 <= token < vocabulary)
