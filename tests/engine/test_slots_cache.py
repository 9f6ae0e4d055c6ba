"""The cache's memory: what is untouched costs nothing, and what is emptied is given back."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from serve_app.engines.cache import SlotCache

MIB = 1024 * 1024


def resident() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def write(cache: SlotCache, row: int, start: int, count: int) -> None:
    new = torch.ones(1, 4, count, 64)
    cache.place.set([row], torch.arange(start, start + count)[None], start + count)
    cache.update(new, new, 0)


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="needs Linux")
def test_only_what_is_written_takes_memory_and_emptying_gives_it_back() -> None:
    before = resident()
    cache = SlotCache(1, rows=64, capacity=8192, device="cpu")  # 1 GiB, were all of it written
    write(cache, 0, 0, 16)
    assert resident() - before < 24 * MIB
    write(cache, 3, 0, 8192)
    grown = resident() - before
    assert grown >= 16 * MIB
    cache.empty_row(3)
    assert grown - (resident() - before) >= 14 * MIB
    cache.place.set([3], torch.tensor([[0]]), 64)
    keys, _ = cache.update(torch.ones(1, 4, 1, 64), torch.ones(1, 4, 1, 64), 0)
    assert keys[0, :, 0].eq(1).all() and keys[0, :, 1:].eq(0).all()


def test_rows_are_written_read_copied_and_swapped() -> None:
    cache = SlotCache(1, rows=5, capacity=32, device="cpu")
    cache.place.set([1, 2], torch.tensor([[0, 1], [0, 1]]), 16)
    new = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).view(2, 3, 2, 4)
    keys, values = cache.update(new, new + 100, 0)
    assert keys.shape == (2, 3, 16, 4) and keys[:, :, :2].equal(new) and values[:, :, :2].equal(new + 100)
    cache.copy_row(1, 4, 2)
    cache.swap_rows(1, 2, (2, 1))
    cache.place.set([4, 1, 2], torch.tensor([[2]] * 3), 16)  # not side by side
    keys, _ = cache.update(torch.zeros(3, 3, 1, 4), torch.zeros(3, 3, 1, 4), 0)
    assert keys[0, :, :2].equal(new[0]) and keys[2, :, :2].equal(new[0]) and keys[1, :, :1].equal(new[1, :, :1])


def test_an_emptied_row_is_zero_where_memory_cannot_be_given_back() -> None:
    cache = SlotCache(1, rows=2, capacity=7, device="cpu")  # rows that fill no page
    cache.place.set([1], torch.tensor([[0]]), 7)
    cache.update(torch.full((1, 1, 1, 3), torch.nan), torch.full((1, 1, 1, 3), torch.nan), 0)
    cache.empty_row(1)
    cache.place.set([1], torch.tensor([[1]]), 7)
    keys, values = cache.update(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 3), 0)
    assert keys.isfinite().all() and values.isfinite().all()
