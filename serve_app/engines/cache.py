"""Keys and values of many requests in one set of tensors, a row for each, written and read in place.

``[rows, heads, capacity, width]`` for each layer, allocated once. On a CPU the memory is anonymous and untouched pages
cost nothing: a row takes up what was written to it, and gives it back when it is emptied (``MADV_DONTNEED``).
That needs Linux; elsewhere, and on a GPU, all of it is allocated at the first pass.
Layers with a sliding window keep whole rows too; the mask hides what lies outside the window.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

NORESERVE = 0x4000
"""``MAP_NORESERVE`` of Linux on x86 and ARM, which not every Python names: most of the pages stay untouched, so the
kernel must not refuse them for their number."""


class Place:
    """Where the pass in progress writes: the row and the position of each new token. All layers share it."""

    def __init__(self, rows: int, capacity: int, device: Any) -> None:
        self.rows = rows
        self.capacity = capacity
        self.device = device
        self._where = torch.empty(0), torch.empty(0)
        self._flat: dict[int, torch.Tensor] = {}

    def set(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Both ``[tokens]``; positions are below the capacity."""
        self._where = rows, positions
        self._flat.clear()

    def flat(self, heads: int) -> torch.Tensor:
        """The places of the new tokens in ``[rows * heads * capacity, width]``, in the order ``[head, token]``."""
        found = self._flat.get(heads)
        if found is None:
            rows, positions = self._where
            each = torch.arange(heads, device=self.device)[:, None]
            found = self._flat[heads] = ((rows * heads + each) * self.capacity + positions).view(-1)
        return found


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer; transformers calls :meth:`update` with the keys and values of the new tokens, ``[1, heads, tokens,
    width]``, and gets all that there are."""

    is_sliding = False

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self._pages: list[tuple[mmap.mmap, int]] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (self._allocate(like) for like in (key_states, value_states))
        self.is_initialized = True

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.place.rows, like.shape[1], self.place.capacity, like.shape[3])
        row_bytes = like.shape[1] * self.place.capacity * like.shape[3] * like.element_size()
        if like.device.type != "cpu" or row_bytes % mmap.PAGESIZE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
            with torch.inference_mode(False):  # rows are also emptied outside of passes
                return torch.zeros(shape, dtype=like.dtype, device=like.device)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        pages = mmap.mmap(-1, row_bytes * self.place.rows, flags=flags)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._pages.append((pages, row_bytes))
        return torch.frombuffer(pages, dtype=like.dtype).view(shape)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = self.place.flat(key_states.shape[1])
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            width = new.shape[3]
            held.view(-1, width).index_copy_(0, where, new.reshape(-1, width))
        return self.keys, self.values

    def copy(self, source: int, target: int, tokens: int) -> None:
        for held in (self.keys, self.values):
            held[target, :, :tokens] = held[source, :, :tokens]

    def swap(self, one: int, other: int, tokens: tuple[int, int]) -> None:
        for held in (self.keys, self.values):
            aside = held[one, :, : tokens[0]].clone()
            held[one, :, : tokens[1]] = held[other, :, : tokens[1]]
            held[other, :, : tokens[0]] = aside

    def empty(self, row: int) -> None:
        """Zero a row: a value that is no number would spoil even what does not look at it."""
        if self._pages:
            for pages, row_bytes in self._pages:
                pages.madvise(mmap.MADV_DONTNEED, row * row_bytes, row_bytes)
            return
        for held in (self.keys, self.values):
            held[row] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.capacity, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.place.capacity


class SlotCache(Cache):  # type: ignore[misc]
    """All layers. ``place`` must be set before each pass."""

    def __init__(self, layers: int, rows: int, capacity: int, device: Any) -> None:
        self.place = Place(rows, capacity, device)
        super().__init__(layers=[SlotLayer(self.place) for _ in range(layers)])

    def _written(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        for layer in self._written():
            layer.copy(source, target, tokens)

    def adopt_row(self, row: int, cache: Any, tokens: int) -> None:
        """Copy into a row what another cache holds of one text.

        Raises:
            ValueError: it does not hold all of it.
        """
        for own, other in zip(self.layers, cache.layers, strict=True):
            if other.keys.shape[2] != tokens:
                raise ValueError("the other cache does not hold the whole text")
            if not own.is_initialized:
                own.lazy_initialization(other.keys, other.values)
            own.keys[row, :, :tokens] = other.keys[0]
            own.values[row, :, :tokens] = other.values[0]

    def swap_rows(self, one: int, other: int, tokens: tuple[int, int]) -> None:
        """Exchange the first tokens of two rows: as many as each holds."""
        for layer in self._written():
            layer.swap(one, other, tokens)

    def empty_row(self, row: int) -> None:
        for layer in self._written():
            layer.empty(row)
