"""The trial of the slot loop at load: a small traffic of its own, held against the whole text read anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from serve_app.engines.decoding import Begun
from serve_app.engines.graphs import Graphs
from serve_app.engines.loop import Feed, Seat, SlotLoop, piece

Reread = Callable[[Begun], torch.Tensor]
"""A text to the logits ``[vocabulary]`` after it, computed without any cache."""

TOLERANCE = 0.05
"""Of the logits' standard deviation: far above rounding, far below what another context makes of them."""
LONGEST = 320
CHUNK = 7
ROWS = 8
CAPTURE_S = 2.0
"""For capturing CUDA graphs while a model loads; what is left is captured when it is needed."""
CAPACITY = 2 * LONGEST
"""Of the cache for the trial: its own, since on a GPU the model's may have fewer rows than the trial needs."""


class Canary:
    """Runs seats by hand; ``wrong`` once something differs from the reference."""

    def __init__(self, loop: SlotLoop, reread: Reread) -> None:
        self._loop = loop
        self._reread = reread
        self._prompts: dict[Seat, list[int]] = {}
        self._replies: dict[Seat, list[int]] = {}
        self.wrong = False

    def sit(self, prompt: Sequence[int]) -> Seat:
        seat = Seat(list(prompt), len(prompt) + 8)
        self._loop.sit(seat)
        self._prompts[seat], self._replies[seat] = list(prompt), []
        return seat

    def read(self, *seats: Seat, most: int = LONGEST, beside: Sequence[Seat] = ()) -> None:
        """Read prompts to their ends, with a step of those ``beside`` in the first pass."""
        while reading := [seat for seat in seats if seat.left]:
            pieces = [piece(seat, min(most, seat.left)) for seat in reading]
            logits = self._loop.run([*pieces, *self._steps(beside)])
            done = [feed.seat for feed in pieces if feed.wanted]
            self._take([*done, *beside], logits, check=True)
            beside = ()

    def step(self, *seats: Seat, check: bool = False) -> None:
        self._take(seats, self._loop.run(self._steps(seats)), check)

    def _steps(self, seats: Sequence[Seat]) -> list[Feed]:
        return [Feed(seat, self._replies[seat][-1:]) for seat in seats]

    def leave(self, seat: Seat) -> list[int]:
        """All that it read, its newest token included."""
        self._loop.leave(seat)
        return self._prompts[seat] + self._replies[seat]

    def _take(self, seats: Sequence[Seat], logits: torch.Tensor, check: bool) -> None:
        for seat, row in zip(seats, logits.float(), strict=True):
            if check:
                self._compare(row, self._reread(Begun(self._prompts[seat], self._replies[seat])).float())
            self._replies[seat].append(int(row.argmax()))

    def _compare(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        self.wrong |= not alike(found, expected)


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits ``[vocabulary]`` differ by no more than rounding."""
    bound = TOLERANCE * expected.std()
    behind = expected.max() - expected[int(found.argmax())]
    away = (found - expected).abs().mean()
    return bool(behind <= bound and away <= bound)


def passes(loop: SlotLoop, reread: Reread, ids: Sequence[int]) -> bool:
    """Whether prompts of different lengths that join, leave and reuse what others read get the logits they should.

    Args:
        ids: of some text.
    """
    windows = [window for window in loop.windows if window < LONGEST - 8]
    longest = min(max([4 * len(ids), *(window + 8 for window in windows)]), LONGEST, loop.limit // 2)
    text = (list(ids) * (longest // len(ids) + 1))[: max(2, longest)]
    canary = Canary(loop, reread)
    first = canary.sit(text)
    canary.read(first, most=CHUNK)  # in pieces
    canary.step(first)
    second, third = canary.sit(text[::-1][: max(1, len(ids) // 2)]), canary.sit([*text[:-2], text[0]])
    canary.read(second, third, beside=[first])  # one with a prefix copied from a running neighbour
    canary.step(first, second, third, check=True)
    conversation = canary.leave(first)
    canary.step(second, third)
    fourth, fifth = canary.sit([*conversation, *ids][: loop.limit - 8]), canary.sit(text[1:])
    canary.read(fourth, fifth)  # one in the row of the one that left
    canary.step(second, third, fourth, fifth, check=True)
    return not canary.wrong


def touch(loop: SlotLoop, ids: Sequence[int]) -> None:
    """Read a few tokens: what a loop allocates at its first pass, it shall allocate while the model loads."""
    seat = Seat(list(ids)[: loop.limit // 2], loop.limit)
    loop.sit(seat)
    loop.run([piece(seat, seat.left)], replay=False)
    loop.leave(seat, spoilt=True)


def try_graphs(loop: SlotLoop, graphs: Graphs, ids: Sequence[int], places: int) -> list[tuple[int, int, float]]:
    """Capture the likeliest passes, unless replays compute other tokens than what they stand for.

    Returns:
        Of passes as they will be: steps, tokens of prompts beside them, seconds.
    """
    text = list(ids)[: loop.limit // 2]
    seats = [Seat(text[skipped:], len(text) + 2) for skipped in range(min(2, places, len(text)))]
    for seat in seats:
        loop.sit(seat)
    trial = Trial(loop)
    if not trial.same([piece(seat, seat.left) for seat in seats]):
        graphs.forgo("they compute other tokens", reading=True)
    for token in (text[0], text[-1]):
        if not trial.same([Feed(seat, [token]) for seat in seats]):
            graphs.forgo("they compute other tokens")
    if graphs.reads and len(seats) > 1:
        for _ in range(2):  # a first replay is slower
            step, both = _beside(loop, seats, text)
        told = [(1, 0, step), (1, len(seats[1].ids), both)]
    else:
        told = [(len(seats), 0, trial.computed_s)]
    for seat in seats:
        loop.leave(seat, spoilt=True)
    graphs.capture(places, CAPTURE_S)
    return told


class Trial:
    """Passes that are computed and then replayed. ``computed_s``: the shortest time of one that was computed."""

    def __init__(self, loop: SlotLoop) -> None:
        self._loop = loop
        self.computed_s = float("inf")

    def same(self, feeds: Sequence[Feed]) -> bool:
        """Whether both get the same logits; True where nothing is replayed. The tokens stay read."""
        begun = time.perf_counter()
        expected = self._loop.run(feeds, replay=False).float().cpu()
        self.computed_s = min(self.computed_s, time.perf_counter() - begun)
        for feed in feeds:
            self._loop.unread(feed.seat, len(feed.tokens))
        found = self._loop.run(feeds).float().cpu()
        return not self._loop.replayed or all(map(alike, found, expected))


def _beside(loop: SlotLoop, seats: Sequence[Seat], text: Sequence[int]) -> tuple[float, float]:
    """Seconds of a step of the first seat, and of one with the second one's prompt beside it."""
    first, second = seats[:2]
    loop.unread(second, len(second.row.ids) if second.row else 0)
    times = []
    for beside in ([], [piece(second, len(second.ids))]):
        begun = time.perf_counter()
        loop.run([Feed(first, [text[0]]), *beside]).cpu()
        times.append(time.perf_counter() - begun)
        loop.unread(first)
    return times[0], times[1]
