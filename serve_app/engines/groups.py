"""What attention must know of a pass, as tensors: which tokens are computed in one call, and what each of them sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from serve_app.engines.gate import LayerKinds
from serve_app.engines.pace import BLOCK
from serve_app.engines.packed import Group, Padded, padded


class Groups:
    """Makes the groups of passes over one cache.

    Args:
        kinds: the layers' kinds of attention.
        capacity: tokens of a row.
        dtype: of the masks.
    """

    def __init__(self, kinds: LayerKinds, capacity: int, device: Any, dtype: Any) -> None:
        self._kinds = kinds
        self._capacity = capacity
        self._device = device
        self._dtype = dtype
        self._lowest = torch.finfo(dtype).min
        self._places = torch.arange(capacity, device=device)

    def sent(self, *numbers: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Each of them on the device: in one copy, which on a GPU nobody waits for."""
        pinned = self._device.type == "cuda"
        joined = torch.tensor(list(itertools.chain(*numbers)), dtype=torch.long, pin_memory=pinned)
        parts: tuple[torch.Tensor, ...]
        parts = joined.to(self._device, non_blocking=True).split([len(part) for part in numbers])
        return parts

    def of(
        self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], steps: int, batches: Sequence[int]
    ) -> list[Group | Padded]:
        """Of a pass in which each row has so many new tokens from its ``start`` on. The first are ``steps``: together,
        over the whole range that their rows lie in. Then come pieces of prompts, in ``batches`` of so many."""
        groups: list[Group | Padded] = []
        if steps:
            groups.append(self._steps(rows[:steps], starts[:steps]))
        number, begin = steps, steps
        for size in batches:
            batch = slice(number, number + size)
            made = self._piece if size == 1 else self._padded
            groups.append(made(rows[batch], starts[batch], counts[batch], begin))
            number, begin = batch.stop, begin + sum(counts[batch])
        return groups

    def first_rows(self, positions: torch.Tensor, length: int) -> Group:
        """A step of each of the first rows, at ``positions``; made on the device alone."""
        every = slice(0, len(positions))
        return Group(every, every, length, self._additive(positions[:, None], length))

    def one_row(self, row: torch.Tensor, positions: torch.Tensor, length: int) -> Padded:
        """A piece of a prompt in one ``row`` (``[1]``), at ``positions``; made on the device alone."""
        line = self._places[: len(positions)]
        return Padded(row, length, self._additive(positions[None], length), line, line)

    def _steps(self, rows: Sequence[int], starts: Sequence[int]) -> Group:
        first, last = min(rows), max(rows)
        length = self._rounded(max(starts) + 1)
        at = dict(zip(rows, starts, strict=True))
        every = range(first, last + 1)
        positions, picked = self.sent([at.get(row, 0) for row in every], [row - first for row in rows])
        masks = self._additive(positions[:, None], length)
        in_order = list(rows) == list(every)
        return Group(slice(0, len(rows)), slice(first, last + 1), length, masks, None if in_order else picked)

    def _piece(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], begin: int) -> Group:
        (row,), (start,), (count,) = rows, starts, counts
        masks = self._additive(self._places[None, start : start + count], start + count)
        return Group(slice(begin, begin + count), slice(row, row + 1), start + count, masks)

    def _padded(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], begin: int) -> Padded:
        length = self._rounded(max(start + count for start, count in zip(starts, counts, strict=True)))
        indices, spread, places, positions = self.sent(rows, *padded(begin, starts, counts))
        masks = self._additive(positions.view(len(rows), -1), length)
        side_by_side = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        held = slice(rows[0], rows[0] + len(rows)) if side_by_side else indices
        return Padded(held, length, masks, spread, places)

    def _rounded(self, length: int) -> int:
        return min(-(-length // BLOCK) * BLOCK, self._capacity)

    def _additive(self, positions: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Masks ``[rows, 1, new tokens, length]`` for new tokens at ``positions`` ``[rows, new tokens]``, by kind."""
        keys, queries = self._places[:length], positions[:, None, :, None]
        past = keys <= queries
        masks = {}
        for kind, window in self._kinds.windows.items():
            seen = past
            if kind == "sliding_attention":
                seen = past & (keys > queries - window)
            elif kind == "chunked_attention":
                seen = past & (keys // window == queries // window)
            masks[kind] = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
            masks[kind].masked_fill_(~seen, self._lowest)
        return masks
