"""Which models the slot loop may run: what their configuration says, and what a trial at load shows.

The gate refuses what is known to be wrong or to depend on the neighbours in a batch. The canary then runs prompts of
different lengths with joins, a departure and a reused prefix, and compares every step's logits with those of one pass
over the whole text: whatever the gate does not know is refused there, before a user sees a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

WINDOWS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
"""The kinds of layers that a mask over a whole row can serve, and the setting that limits what they see."""
ALIBI = frozenset({"bloom", "mpt"})
UNEVEN_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change for a whole batch with its longest text."""


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """``layers``: each one's kind. ``windows``: tokens that each kind sees (0: all). ``keeps_logits``: whether the
    model can leave out the logits of places that nobody asks for."""

    layers: tuple[str, ...]
    windows: Mapping[str, int]
    keeps_logits: bool

    @classmethod
    def of(cls, model: Any) -> LayerKinds:
        """Of a model that :func:`refusal` has nothing against."""
        config = model.config.get_text_config(decoder=True)
        layers, settings = get_layer_types_and_kwargs(config)
        windows = {kind: int(given.get("sliding_window") or 0) for kind, given in zip(layers, settings, strict=True)}
        return cls(tuple(layers), windows, "logits_to_keep" in inspect.signature(model.forward).parameters)


def refusal(model: Any) -> str | None:
    """Why the slot loop cannot run the model, or None."""
    return next(_reasons(model), None)


def _reasons(model: Any) -> Iterator[str]:
    config = model.config.get_text_config(decoder=True)
    takes = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        yield "it has an encoder"
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        yield "it keeps state of a request outside its cache"
    if config.model_type in ALIBI or getattr(config, "alibi", False):
        yield "it uses ALiBi"
    if not {"past_key_values", "position_ids", "attention_mask"} <= takes.keys():
        yield "its passes take no positions"
    kinds, settings = get_layer_types_and_kwargs(config)
    if others := sorted(set(kinds) - WINDOWS.keys()):
        yield f"it has layers of the kind {', '.join(others)}"
    if len({(kind, given.get("sliding_window")) for kind, given in zip(kinds, settings, strict=True)}) > len(
        set(kinds)
    ):
        yield "its layers have windows of different sizes"
    if set(_rope_types(getattr(config, "rope_parameters", None))) & set(UNEVEN_ROPE):
        yield "its rotary embedding depends on the longest text of a batch"


def _rope_types(parameters: Any) -> Iterator[str]:
    """Of all layers; some models have one set of parameters for each kind of layer."""
    if isinstance(parameters, Mapping):
        kind = parameters.get("rope_type")
        if isinstance(kind, str):
            yield kind
        for value in parameters.values():
            yield from _rope_types(value)
