"""CUDA graphs of passes: one launch replays what Python and hundreds of launches of kernels took far longer for.

A graph repeats exactly what was captured, at the same addresses and in the same shapes. So steps are computed over the
first rows of the cache, all of them, and over a range of lengths; a piece of a prompt has a graph of its own, for one
row wherever it lies. Numbers of rows, tokens and lengths are rounded up to few sizes (:class:`Shape`), and what varies
stands in one tensor that is overwritten before each replay. Rows that have no step, and tokens that only fill a piece
up, get inputs that do no harm.
"""

from __future__ import annotations

import gc
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
PIECES = 64, 256
"""Tokens of a prompt that a graph reads, from the next smaller size on."""
MOST_GRAPHS = 48
"""Kept at once; the one that was not used for the longest time makes room."""
Pass = Callable[[], torch.Tensor]
Record = Callable[["Shape", Pass], Pass]


@dataclass(frozen=True, slots=True)
class Shape:
    """``rows`` of the cache, from its first, with a step each, or one row anywhere with more ``tokens``, of a prompt;
    attention looks at ``length`` tokens of each row."""

    rows: int
    length: int
    tokens: int = 1

    @classmethod
    def of(cls, steps: int, length: int, most: Shape) -> Shape:
        """The smallest that holds so many rows and tokens; ``most`` is the whole cache."""
        return cls(min(_power(steps, 1), most.rows), min(_power(length, SHORTEST), most.length))

    @classmethod
    def of_piece(cls, tokens: int, length: int, most: Shape) -> Shape:
        """The smallest that holds so many tokens of a prompt (at most the last of :data:`PIECES`), ``length`` with what
        was read before them."""
        return cls(1, cls.of(1, length, most).length, next(size for size in PIECES if size >= tokens))

    @property
    def reads(self) -> bool:
        return self.tokens > 1


def _power(least: int, start: int) -> int:
    return max(start, 1 << (least - 1).bit_length())


def shapes(places: int, most: Shape) -> Iterator[Shape]:
    """Of all pieces, and of all steps with up to ``places`` rows: short ones first, and of one length the large ones
    (what is captured later finds room in the memory of what is larger)."""
    length = 0
    while length < most.length:
        length = Shape.of(1, length + 1, most).length
        yield from (Shape(1, length, tokens) for tokens in reversed(PIECES))
        rows = {Shape.of(steps, length, most).rows for steps in range(1, places + 1)}
        yield from (Shape(count, length) for count in sorted(rows, reverse=True))


class Graphs:
    """The graphs of one model and cache.

    Args:
        compute: a pass of a shape to logits ``[rows, vocabulary]``, from ``[4, rows or tokens]`` integers: each token,
            its position, the place that it is written to, and, of steps, the rows whose logits are wanted; of a piece,
            its row and which of the tokens is the last one, whose logits are wanted.
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
        self.reads = True
        """Whether pieces of prompts are replayed too."""

    def __repr__(self) -> str:
        return f"Graphs({list(self._kept) if self.active else 'none'})"

    def shape(self, steps: int, length: int) -> Shape:
        """Of a step of so many rows, the longest of them with ``length`` tokens."""
        return Shape.of(steps, length, self._most)

    def piece(self, tokens: int, length: int) -> Shape:
        """Of a piece of a prompt, at the end of which its row has ``length`` tokens."""
        return Shape.of_piece(tokens, length, self._most)

    def capture(self, places: int, seconds: float) -> None:
        """The likeliest steps of up to ``places`` rows, for about so long."""
        until = time.monotonic() + seconds
        for shape in shapes(places, self._most):
            if shape.reads and not self.reads:
                continue
            if not self.active or time.monotonic() > until or len(self._kept) >= MOST_GRAPHS:
                return
            self._found(shape)

    def run(self, shape: Shape, tokens: Mapping[int, tuple[int, int]], wanted: Sequence[int]) -> torch.Tensor | None:
        """The logits ``[wanted, vocabulary]`` of a step's rows; None where there are no graphs (any more).

        Args:
            tokens: and their positions, of the rows that have one. The rows are among the shape's.
        """
        found = self._replay(shape, tokens, wanted)
        return None if found is None else found[: len(wanted)].clone()

    def read(self, shape: Shape, row: int, start: int, tokens: Sequence[int]) -> torch.Tensor | None:
        """The logits ``[1, vocabulary]`` after a piece of a prompt that begins at ``start`` of its row; or None."""
        line = {number: (token, start + number) for number, token in enumerate(tokens)}
        found = self._replay(shape, line, (row, len(tokens) - 1))
        return None if found is None else found.clone()

    def _replay(
        self, shape: Shape, tokens: Mapping[int, tuple[int, int]], picked: Sequence[int]
    ) -> torch.Tensor | None:
        found = self._found(shape)
        if found is None:
            return None
        held, replay = found
        held.copy_(self._inputs(shape, tokens, picked), non_blocking=True)
        return replay()

    def _inputs(self, shape: Shape, tokens: Mapping[int, tuple[int, int]], picked: Sequence[int]) -> torch.Tensor:
        idle, count = (0, 0, self._most.length), shape.rows * shape.tokens
        line = [(*tokens[number], tokens[number][1]) if number in tokens else idle for number in range(count)]
        picked = [*picked, *[0] * (count - len(picked))]
        return torch.tensor([*zip(*line, strict=True), picked], pin_memory=self._device.type == "cuda")

    def forgo(self, reason: str, reading: bool = False) -> None:
        """Use none from now on, or only none for ``reading``."""
        log.warning("%s without CUDA graphs: %s", "prompts are read" if reading else "steps run", reason)
        self.reads, self.active = False, self.active and reading
        for shape in [shape for shape in self._kept if shape.reads or not self.active]:
            del self._kept[shape]

    def _found(self, shape: Shape) -> tuple[torch.Tensor, Pass] | None:
        if not (self.reads if shape.reads else self.active):
            return None
        if shape in self._kept:
            self._kept.move_to_end(shape)
            return self._kept[shape]
        while len(self._kept) >= MOST_GRAPHS:
            self._kept.popitem(last=False)
        held = self._inputs(shape, {}, ()).to(self._device)
        try:
            self._kept[shape] = held, self._record(shape, lambda: self._compute(shape, held))
        except Exception as fault:  # the border to the libraries: what cannot be captured can still be computed
            reason = f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else 'no reason given'}"
            self.forgo(reason, reading=shape.reads)
            return None
        return self._kept[shape]


class Recorder:
    """Captures passes, on a stream of its own and in one pool of memory: replays never run beside each other."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._proved: set[bool] = set()  # that neither steps (False) nor pieces of prompts (True) wait for the GPU
        self._latest: torch.cuda.CUDAGraph | None = None  # the allocator may still refer to one that failed

    def __call__(self, shape: Shape, compute: Pass) -> Pass:
        """Raises whatever ``compute`` or its capture raises."""
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(here):  # a capture that fails leaves the other stream current
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                compute()  # what a first pass prepares (kernels, workspaces of this thread and stream) must be ready
                if shape.reads not in self._proved:
                    with _no_waiting():
                        compute()
            here.wait_stream(self._stream)
            graph = self._latest = torch.cuda.CUDAGraph()
            how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            try:
                with _no_garbage(), torch.cuda.graph(graph, **how):
                    found = compute()
            except Exception:
                self._end_allocations()
                raise
        self._proved.add(shape.reads)

        def replay() -> torch.Tensor:
            graph.replay()
            return found

        return replay

    def _end_allocations(self) -> None:
        """What torch does not do after a capture that CUDA refused to end; without it no memory could be freed."""
        with suppress(Exception):  # it was done, or is done otherwise in this version of torch
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing is collected meanwhile: freeing another model's graphs calls CUDA, in the midst of a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Operations that wait for the GPU raise. They could not be captured, and a capture that breaks off leaves
    more behind than an exception. In the whole process, so it is done once for a model and kind of pass."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
