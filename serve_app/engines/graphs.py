"""CUDA graphs of steps: one launch replays what Python and hundreds of launches of kernels took many times as long for.

A graph repeats exactly what was captured, at the same addresses and in the same shapes. So a pass that consists of
steps only is computed over the first rows of the cache, all of them, and over a range of lengths: both are rounded up
to few sizes (:class:`Shape`), and what varies stands in one tensor that is overwritten before each replay. Rows that
have no step get inputs that do no harm.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

SHORTEST = 256
"""Tokens that the shortest graph attends to: below that, more of them cost nothing."""
MOST_GRAPHS = 32
"""Kept at once; the one that was not used for the longest time makes room."""
Pass = Callable[[], torch.Tensor]
Record = Callable[[Pass], Pass]


@dataclass(frozen=True, slots=True)
class Shape:
    """``rows`` of the cache, from its first; attention looks at ``length`` tokens of each."""

    rows: int
    length: int

    @classmethod
    def of(cls, steps: int, length: int, most: Shape) -> Shape:
        """The smallest that holds so many rows and tokens; ``most`` is the whole cache."""
        return cls(min(_power(steps, 1), most.rows), min(_power(length, SHORTEST), most.length))


def _power(least: int, start: int) -> int:
    return max(start, 1 << (least - 1).bit_length())


def shapes(places: int, most: Shape) -> Iterator[Shape]:
    """Of all steps with up to ``places`` rows: short ones first, and of one length the large ones (what is captured
    later finds room in the memory of what is larger)."""
    length = 0
    while length < most.length:
        length = Shape.of(1, length + 1, most).length
        rows = {Shape.of(steps, length, most).rows for steps in range(1, places + 1)}
        yield from (Shape(count, length) for count in sorted(rows, reverse=True))


class Graphs:
    """The graphs of one model and cache.

    Args:
        compute: a pass of a shape to logits ``[rows, vocabulary]``, from ``[4, rows]`` integers: each row's token, the
            token's position, the place that it is written to, and the rows whose logits are wanted.
        most: the whole cache. Its rows have a place more than ``length``: what needs none writes there.
        record: makes a replay of a pass; may run it before. See :class:`Recorder`.
    """

    def __init__(
        self, compute: Callable[[Shape, torch.Tensor], torch.Tensor], most: Shape, device: Any, record: Record
    ) -> None:
        self._compute = compute
        self._most = most
        self._device = device
        self._record = record
        self._kept: OrderedDict[Shape, tuple[torch.Tensor, Pass]] = OrderedDict()
        self.active = True

    def __repr__(self) -> str:
        return f"Graphs({[(shape.rows, shape.length) for shape in self._kept] if self.active else 'none'})"

    def shape(self, steps: int, length: int) -> Shape:
        """Of a step of so many rows, the longest of them with ``length`` tokens."""
        return Shape.of(steps, length, self._most)

    def capture(self, places: int, seconds: float) -> None:
        """The likeliest steps of up to ``places`` rows, for about so long."""
        until = time.monotonic() + seconds
        for shape in shapes(places, self._most):
            if not self.active or time.monotonic() > until or len(self._kept) >= MOST_GRAPHS:
                return
            self._found(shape)

    def run(self, shape: Shape, tokens: Mapping[int, tuple[int, int]], wanted: Sequence[int]) -> torch.Tensor | None:
        """The logits ``[wanted, vocabulary]`` of rows; None where there are no graphs (any more).

        Args:
            tokens: and their positions, of the rows that have one. The rows are among the shape's.
        """
        found = self._found(shape) if self.active else None
        if found is None:
            return None
        held, replay = found
        held.copy_(self._inputs(shape, tokens, wanted), non_blocking=True)
        return replay()[: len(wanted)].clone()

    def _inputs(self, shape: Shape, tokens: Mapping[int, tuple[int, int]], wanted: Sequence[int]) -> torch.Tensor:
        idle = 0, 0, self._most.length
        by_row = [(*tokens[row], tokens[row][1]) if row in tokens else idle for row in range(shape.rows)]
        picked = [*wanted, *[0] * (shape.rows - len(wanted))]
        return torch.tensor([*zip(*by_row, strict=True), picked], pin_memory=self._device.type == "cuda")

    def forgo(self, reason: str) -> None:
        """Use none from now on."""
        log.warning("steps run without CUDA graphs: %s", reason)
        self.active = False
        self._kept.clear()

    def _found(self, shape: Shape) -> tuple[torch.Tensor, Pass] | None:
        if shape in self._kept:
            self._kept.move_to_end(shape)
            return self._kept[shape]
        while len(self._kept) >= MOST_GRAPHS:
            self._kept.popitem(last=False)
        held = self._inputs(shape, {}, ()).to(self._device)
        try:
            self._kept[shape] = held, self._record(lambda: self._compute(shape, held))
        except Exception as fault:  # the border to the libraries: what cannot be captured can still be computed
            self.forgo(f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else 'no reason given'}")
            return None
        return self._kept[shape]


class Recorder:
    """Captures passes, on a stream of its own and in one pool of memory: replays never run beside each other."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._proved = False
        self._latest: torch.cuda.CUDAGraph | None = None  # the allocator may still refer to one that failed

    def __call__(self, compute: Pass) -> Pass:
        """Raises whatever ``compute`` or its capture raises."""
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(here):  # a capture that fails leaves the other stream current
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                compute()  # what a first pass prepares (kernels, workspaces of this thread and stream) must be ready
                if not self._proved:
                    with _no_waiting():
                        compute()
            here.wait_stream(self._stream)
            graph = self._latest = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    found = compute()
            except Exception:
                self._end_allocations()
                raise
        self._proved = True

        def replay() -> torch.Tensor:
            graph.replay()
            return found

        return replay

    def _end_allocations(self) -> None:
        """What torch does not do after a capture that CUDA refused to end; without it no memory could be freed."""
        with suppress(Exception):  # it was done, or is done otherwise in this version of torch
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Operations that wait for the GPU raise. They could not be captured, and a capture that breaks off leaves
    more behind than an exception. In the whole process, so it is done once for a model."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
