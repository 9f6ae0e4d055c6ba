"""The rows of the cache: who holds which, what is reused, what is given up. No tensors."""

from __future__ import annotations

import random

from serve_app.engines.rows import Row, Rows, common_length


def fill(rows: Rows, ids: list[int], room: int | None = None, release: bool = True) -> Row:
    """A request that read ``ids`` and, unless told otherwise, is over."""
    taken = rows.take(ids, room or len(ids))
    taken.row.ids = list(ids)
    if release:
        rows.release(taken.row)
    return taken.row


def numbers(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_the_common_beginning_is_found_at_every_length() -> None:
    for length in range(12):
        assert common_length([*numbers(0, length), 99], [*numbers(0, length), 98, 97]) == length
    assert common_length([], [1]) == 0 and common_length([1, 2], [1, 2]) == 2


def test_a_conversation_that_goes_on_gets_its_own_row_back() -> None:
    rows = Rows(4, 1000)
    old = fill(rows, numbers(0, 50))
    taken = rows.take([*numbers(0, 50), 7, 8], 80)
    assert (taken.row, taken.source, taken.common, taken.emptied) == (old, old, 50, ())
    assert old.held and old.occupied == 80


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    rows = Rows(4, 1000)
    fill(rows, numbers(0, 50))
    assert rows.take(numbers(0, 50), 60).common == 49


def test_a_common_beginning_is_copied_so_that_both_can_be_used_again() -> None:
    rows = Rows(4, 1000)
    old = fill(rows, numbers(0, 50))
    taken = rows.take([*numbers(0, 30), *numbers(900, 30)], 80)
    assert taken.row is not old and taken.source is old and taken.common == 30
    assert old.ids == numbers(0, 50) and taken.row.ids == numbers(0, 30)


def test_a_running_request_s_beginning_is_copied_too() -> None:
    rows = Rows(4, 1000)
    running = fill(rows, numbers(0, 50), release=False)
    taken = rows.take([*numbers(0, 50), 7], 80)
    assert taken.source is running and taken.row is not running and taken.common == 50


def test_a_short_common_beginning_is_not_worth_a_copy() -> None:
    rows = Rows(4, 1000)
    fill(rows, numbers(0, 50))
    taken = rows.take([0, 1, 2, *numbers(900, 30)], 80)
    assert (taken.source, taken.common) == (None, 0)


def test_the_least_recently_used_row_goes_first() -> None:
    rows = Rows(3, 10_000)
    first, second, third = (fill(rows, numbers(100 * n, 40)) for n in range(3))
    rows.release(rows.take(numbers(0, 41), 41).row)  # the first is used again
    taken = rows.take(numbers(900, 40), 50)
    assert taken.row is second and taken.emptied == (second,) and third.ids and first.ids


def test_kept_rows_make_room_for_the_budget() -> None:
    rows = Rows(8, 200)
    kept = [fill(rows, numbers(100 * n, 60)) for n in range(3)]
    taken = rows.take(numbers(900, 20), 100)
    assert taken.emptied == (kept[0], kept[1]) and kept[2].occupied == 60


def test_without_room_for_a_copy_the_source_itself_is_taken() -> None:
    rows = Rows(8, 200)
    old = fill(rows, numbers(0, 150))
    taken = rows.take([*numbers(0, 60), *numbers(900, 10)], 120)
    assert taken.row is old and taken.common == 60 and old.ids == numbers(0, 60)


def test_running_rows_are_brought_together() -> None:
    rows = Rows(8, 10_000)
    held = [fill(rows, numbers(100 * n, 20), release=False) for n in range(6)]
    for row in held[1:5]:
        rows.release(row)
    assert rows.swaps([held[0]]) == [] and rows.swaps([held[5]]) == []  # one alone may lie anywhere
    pairs = rows.swaps([held[0], held[5]])
    assert pairs == [(held[5], held[1])] and (held[0].index, held[5].index, held[1].index) == (0, 1, 5)
    assert [row.index for row in rows.by_index] == list(range(8))


def test_the_running_rows_come_to_the_front_and_the_emptiest_make_room() -> None:
    rows = Rows(8, 1000)
    for row, length in zip(rows.by_index, (9, 0, 5, 0, 3, 0, 7, 2), strict=True):
        row.ids = numbers(0, length)
    kept, empty, running = rows.by_index[0], rows.by_index[3], [rows.by_index[index] for index in (1, 6)]
    assert rows.to_front(running, 8) == []
    assert rows.to_front(running, 4) == [(running[1], empty)]
    assert (running[0].index, running[1].index, empty.index, kept.index) == (1, 3, 6, 0)
    assert rows.to_front(running, 2) == [(running[1], kept)]
    assert sorted(row.index for row in running) == [0, 1]
    assert [row.index for row in rows.by_index] == list(range(8))


def test_random_traffic_keeps_the_account() -> None:
    rng = random.Random(3)
    rows = Rows(12, 600)
    running: list[Row] = []
    for _ in range(3000):
        if running and (len(running) == 6 or rng.random() < 0.5):
            row = running.pop(rng.randrange(len(running)))
            row.ids = row.ids[: row.occupied]
            rows.release(row)
        else:
            prompt = [rng.randrange(3)] * rng.randint(1, 40) + numbers(rng.randrange(5), rng.randint(1, 40))
            room = len(prompt) + rng.randint(1, 20)
            taken = rows.take(prompt, room)
            assert taken.row not in running and taken.row.held
            assert taken.common < len(prompt) and taken.row.ids == prompt[: taken.common]
            taken.row.ids = prompt
            running.append(taken.row)
        if rng.random() < 0.5:
            rows.swaps(running)
        else:
            rows.to_front(running, max(1, len(running)))
            assert all(row.index < len(running) for row in running)
        assert [row.index for row in rows.by_index] == list(range(12))
        assert {row for row in rows.by_index if row.held} == set(running)
        assert sum(row.occupied for row in rows.by_index) <= 600
