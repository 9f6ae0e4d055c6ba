"""The cache's memory: what is untouched costs nothing, and what is emptied is given back."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from serve_app.engines.cache import SlotCache

MIB = 1024 * 1024


def resident() -> int:
    """Bytes in memory of this process's large anonymous mappings: what else it holds or gives back does not count."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)", line):
            anonymous = mapping[1] in ("", "/dev/zero (deleted)") or mapping[1].startswith("[anon")
        elif size := re.match(r"Size:\s+(\d+) kB", line):
            counts = anonymous and int(size[1]) >= 256 * 1024
        elif counts and (found := re.match(r"Rss:\s+(\d+) kB", line)):
            total += int(found[1]) * 1024
    return total


def put(cache: SlotCache, new: torch.Tensor, *places: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``new``: ``[1, heads, tokens, width]``, for (row, position) each; keys and values afterwards."""
    rows, positions = torch.tensor(places).T
    cache.place.set(rows, positions)
    return cache.update(new, new + 100, 0)


def write(cache: SlotCache, row: int, start: int, count: int) -> None:
    put(cache, torch.ones(1, 4, count, 64), *((row, start + n) for n in range(count)))


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
    keys, _ = put(cache, torch.ones(1, 4, 1, 64), (3, 0))
    assert keys[3, :, 0].eq(1).all() and keys[3, :, 1:].eq(0).all()


def test_rows_are_written_read_copied_and_swapped() -> None:
    cache = SlotCache(1, rows=5, capacity=32, device="cpu")
    new = torch.arange(3 * 4 * 4, dtype=torch.float32).view(1, 3, 4, 4)
    keys, values = put(cache, new, (1, 0), (1, 1), (2, 0), (2, 1))
    assert keys.shape == (5, 3, 32, 4)
    for row in (1, 2):
        written = new[0, :, 2 * row - 2 : 2 * row]
        assert keys[row, :, :2].equal(written) and values[row, :, :2].equal(written + 100)
    cache.copy_row(1, 4, 2)
    cache.swap_rows(1, 2, (2, 1))
    keys, _ = put(cache, torch.zeros(1, 3, 3, 4), (4, 2), (1, 2), (2, 2))
    assert keys[4, :, :2].equal(new[0, :, :2]) and keys[2, :, :2].equal(new[0, :, :2])
    assert keys[1, :, :1].equal(new[0, :, 2:3]) and keys[1, :, 2].eq(0).all()


def test_an_emptied_row_is_zero_where_memory_cannot_be_given_back() -> None:
    cache = SlotCache(1, rows=2, capacity=7, device="cpu")  # rows that fill no page
    put(cache, torch.full((1, 1, 1, 3), torch.nan), (1, 0))
    cache.empty_row(1)
    keys, values = put(cache, torch.ones(1, 1, 1, 3), (1, 1))
    assert keys.isfinite().all() and values.isfinite().all()


def test_rows_that_came_to_be_in_a_pass_are_emptied_outside_of_one() -> None:
    cache = SlotCache(1, rows=2, capacity=7, device="cpu")  # rows that fill no page, as on a GPU
    with torch.inference_mode():
        keys, _ = put(cache, torch.ones(1, 1, 1, 3), (1, 0))
    cache.empty_row(1)
    assert keys.eq(0).all()


def test_a_cache_that_nothing_was_read_into_adopts_a_text() -> None:
    other = DynamicCache()
    other.update(torch.ones(1, 2, 3, 4), torch.full((1, 2, 3, 4), 2.0), 0)
    cache = SlotCache(1, rows=2, capacity=8, device="cpu")
    cache.adopt_row(1, other, 3)
    keys, values = put(cache, torch.zeros(1, 2, 1, 4), (0, 0))
    assert keys[1, :, :3].eq(1).all() and values[1, :, :3].eq(2).all()
