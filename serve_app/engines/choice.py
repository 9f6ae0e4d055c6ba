"""Which decoder a model gets: the slots where they compute what they should, else one pass for each request.

Left-padded micro-batches for what the slots refuse are not built: encoders, images and state-space models keep their
right order and their cancellation in passes of their own, and what a batch would gain for them was not measured.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from serve_app.engines import canary, gate
from serve_app.engines.decoding import SoloDecoder
from serve_app.engines.loading import Loaded
from serve_app.engines.slots import KEPT_ROWS, SlotDecoder, SlotLoop

log = logging.getLogger(__name__)


def choose(
    loaded: Loaded, ids: Sequence[int], places: int, limit: int | None, budget: int
) -> SlotDecoder | SoloDecoder:
    """A decoder that has been tried on the ids of some text; its ``description`` says which, and why.

    Args:
        places: requests that shall run at once.
        limit: tokens of prompt and reply together, or None.
        budget: tokens that all requests may hold together.
    """
    solo = SoloDecoder(loaded)
    if not solo.check(ids):
        solo.cached = False
        solo.reason = "with its cache the model computes other tokens"
    else:
        solo.reason = gate.refusal(loaded.model)
        if solo.reason is None:
            slots = _slots(solo, loaded, places, min(limit or budget, budget), budget)
            solo.reason = _trial(slots, solo, ids)
            if solo.reason is None:
                return slots
    log.warning("%s: no continuous batching: %s", loaded.info.id, solo.reason)
    return solo


def _slots(solo: SoloDecoder, loaded: Loaded, places: int, limit: int, budget: int) -> SlotDecoder:
    if loaded.device == "cpu":
        rows = places + KEPT_ROWS  # untouched rows take no memory
    else:
        rows = places = max(1, min(places, budget // limit))
    loop = SlotLoop(loaded.model, gate.LayerKinds.of(loaded.model), rows, limit, budget)
    return SlotDecoder(solo, loop, places)


def _trial(slots: SlotDecoder, solo: SoloDecoder, ids: Sequence[int]) -> str | None:
    try:
        with torch.inference_mode():
            passed = canary.passes(slots.loop, solo.reread, ids)
    except Exception:  # the border to the libraries: a model that cannot do this can still run alone
        log.exception("the trial of the slots failed")
        return "it cannot run in shared passes"
    return None if passed else "in shared passes the model computes other tokens"
