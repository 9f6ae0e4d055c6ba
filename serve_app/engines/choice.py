"""Which decoder a model gets: the slots where they compute what they should, else micro-batches, else one request each.

What is chosen, and why, is in the decoder's description, and so in the model's state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from serve_app.engines import canary, gate
from serve_app.engines.batch import BatchDecoder
from serve_app.engines.decoding import Passes
from serve_app.engines.graphs import PIECES, Recorder
from serve_app.engines.loading import Loaded
from serve_app.engines.loop import SlotLoop
from serve_app.engines.pace import Pace
from serve_app.engines.slots import KEPT_ROWS, SlotDecoder

log = logging.getLogger(__name__)


def choose(
    loaded: Loaded,
    ids: Sequence[int],
    places: int,
    limit: int | None,
    budget: int,
    graphs: bool = True,
    batch_tokens: int | None = None,
) -> SlotDecoder | BatchDecoder:
    """A decoder that has been tried on the ids of some text; its ``description`` says which, and why.

    Args:
        places: requests that shall run at once.
        limit: tokens of prompt and reply together, or None.
        budget: tokens that all requests may hold together.
        graphs: whether steps may be CUDA graphs.
        batch_tokens: of prompts in one pass at most; None: what suits the device.
    """
    passes = Passes(loaded)
    if not passes.check(ids):
        passes.cached = False
        batch = BatchDecoder(passes, 1, "with its cache the model computes other tokens")
    else:
        reason = gate.refusal(loaded.model)
        batch = _batch(passes, ids, places, reason)
        if reason is None:
            slots = _slots(batch, passes, loaded, places, min(limit or budget, budget), budget, graphs)
            if batch_tokens is not None:
                slots.pace = Pace(batch_tokens)
            batch.reason = _trial(loaded, slots, passes, ids)
            if batch.reason is None:
                return slots
    log.warning("%s: no continuous batching: %s", loaded.info.id, batch.reason)
    return batch


def _batch(passes: Passes, ids: Sequence[int], places: int, reason: str | None) -> BatchDecoder:
    try:
        padding = passes.keeps_state or places == 1 or passes.check_padding(ids)
    except Exception:  # the border to the libraries: a model that cannot do this can still run alone
        log.exception("the trial of padded batches failed")
        padding = False
    if not padding:
        reason = ", and ".join(filter(None, (reason, "in padded batches the model computes other tokens")))
    return BatchDecoder(passes, places if padding else 1, reason)


def _slots(
    batch: BatchDecoder, passes: Passes, loaded: Loaded, places: int, limit: int, budget: int, graphs: bool
) -> SlotDecoder:
    rows = places + KEPT_ROWS
    if loaded.device != "cpu":  # there untouched rows take memory too
        rows = max(1, min(rows, budget // limit))
        places = min(places, rows)
    kinds = gate.LayerKinds.of(loaded.model)
    record = Recorder(loaded.model.device) if graphs and _on_one_gpu(loaded.model) else None
    loop = SlotLoop(loaded.model, kinds, rows, limit, budget, record)
    # A window's own cache forgets what lies outside it, and a row must hold everything.
    adopts = loaded.processor is not None and set(kinds.windows) == {"full_attention"}
    return SlotDecoder(batch, passes, loop, places, adopts)


def _on_one_gpu(model: Any) -> bool:
    return {tensor.device for tensor in model.parameters()} == {model.device} and model.device.type == "cuda"


def _trial(loaded: Loaded, slots: SlotDecoder, passes: Passes, ids: Sequence[int]) -> str | None:
    limit = min(slots.loop.limit, canary.CAPACITY)
    loop = SlotLoop(loaded.model, gate.LayerKinds.of(loaded.model), canary.ROWS, limit, canary.ROWS * limit)
    try:
        with torch.inference_mode():
            passed = canary.passes(loop, passes.reread, ids)
            if passed:
                canary.touch(slots.loop, ids)
            if passed and slots.loop.graphs is not None:
                for told in canary.try_graphs(slots.loop, slots.loop.graphs, ids, slots.places or 1):
                    slots.pace.passed(*told)
                if slots.loop.graphs.reads:
                    slots.pace.least = PIECES[-1]
    except Exception:  # the border to the libraries: a model that cannot do this can still run alone
        log.exception("the trial of the slots failed")
        return "it cannot run in shared passes"
    return None if passed else "in shared passes the model computes other tokens"
