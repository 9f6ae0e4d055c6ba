"""Attention for a pass in which the new tokens of many requests lie one after the other in a single line.

Everything in a model but its attention looks at one token at a time, so nothing is padded: the tokens of a step and
pieces of prompts of any length share the pass. Only attention must know which token belongs to whom. While such a pass
runs, the model's attention is exchanged for :func:`attend`, which calls the model's own once for each :class:`Group`
and, where calls cost more than padding, for each :class:`Padded` one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "rotunda_packed"
"""Of :func:`attend` among transformers' attention functions."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens whose attention is computed in one call: one token for each of many rows, or many tokens of one row.

    Args:
        tokens: the group's, in the line.
        rows: of the cache, side by side.
        length: tokens that attention sees of each row.
        masks: additive, ``[rows, 1, tokens of each row, length]``, by kind of attention.
        picked: the rows that have a token, counted from the first of ``rows``; None where all have.
    """

    tokens: slice
    rows: slice
    length: int
    masks: Mapping[str, torch.Tensor]
    picked: torch.Tensor | None = None

    def attend(self, function: Callable[..., torch.Tensor], kind: str, *states: Any) -> torch.Tensor:
        """``[tokens, heads, width]`` from the queries ``[1, heads, all tokens, width]`` and the cache's two tensors."""
        query, keys, values = states
        query = query[:, :, self.tokens]
        by_row = self.rows.stop - self.rows.start > 1 or query.shape[2] == 1
        if by_row:
            query = query.transpose(0, 2)
        if self.picked is not None:
            spread = query.new_zeros(self.rows.stop - self.rows.start, *query.shape[1:])
            query = spread.index_copy_(0, self.picked, query)
        found = function(query, *(held[self.rows, :, : self.length] for held in (keys, values)), self.masks[kind])
        found = found if self.picked is None else found[self.picked]
        return found.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Padded:
    """Pieces of several prompts in one call, each padded to the longest of them.

    Args:
        rows: of the cache, one for each piece: side by side, or their numbers.
        length: tokens that attention sees of each row.
        masks: additive, ``[pieces, 1, longest, length]``, by kind of attention.
        spread: ``[pieces * longest]``, which token of the line stands where; any one in the padding.
        places: ``[tokens]``, where each of the group's tokens stands.
    """

    rows: slice | torch.Tensor
    length: int
    masks: Mapping[str, torch.Tensor]
    spread: torch.Tensor
    places: torch.Tensor

    def attend(self, function: Callable[..., torch.Tensor], kind: str, *states: Any) -> torch.Tensor:
        """See :meth:`Group.attend`."""
        query, keys, values = states
        longest = self.masks[kind].shape[2]
        query = query[0].index_select(1, self.spread).unflatten(1, (-1, longest)).transpose(0, 1)
        found = function(query, *(held[self.rows, :, : self.length] for held in (keys, values)), self.masks[kind])
        return found.flatten(0, 1)[self.places]


MOST_AREA = 2**24
"""Queries times keys of one call: its mask takes twice as many bytes in half precision."""
MOST_KEYS = 2**15
"""Keys of one call, whose rows are copied for it."""
FREE_AREA = 2**20
"""Of padding that computes faster than another call is made."""


def together(pieces: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Which pieces of prompts to compute in one call: their numbers, those of similar length together.

    The padding stays within twice what is needed, or :data:`FREE_AREA`.

    Args:
        pieces: how many tokens each has, and to what length of its row it looks.
    """
    batches: list[list[int]] = []
    needed = 0
    for number in sorted(range(len(pieces)), key=lambda number: pieces[number], reverse=True):
        own = pieces[number][0] * pieces[number][1]
        if batches:
            more = [*batches[-1], number]
            keys = len(more) * max(pieces[one][1] for one in more)
            area = keys * pieces[more[0]][0]
            if area <= MOST_AREA and keys <= MOST_KEYS and area - needed - own <= max(needed + own, FREE_AREA):
                batches[-1], needed = more, needed + own
                continue
        batches.append([number])
        needed = own
    return batches


def padded(begin: int, starts: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """For pieces whose tokens stand in the line from ``begin`` on: ``spread`` and ``places`` of :class:`Padded`, and
    the position of each query, ``[pieces * longest]`` (0 in the padding, which then sees one key)."""
    spread: list[int] = []
    places: list[int] = []
    positions: list[int] = []
    for start, count in zip(starts, counts, strict=True):
        padding = [0] * (max(counts) - count)
        places += range(len(spread), len(spread) + count)
        spread += [*range(begin, begin + count), *padding]
        positions += [*range(start, start + count), *padding]
        begin += count
    return spread, places, positions


@dataclass(frozen=True, slots=True)
class Packed:
    """What :func:`attend` must know of a pass. ``kinds``: by the address of the mask that stands for each.
    ``own``: the name of the model's own attention."""

    groups: Sequence[Group | Padded]
    kinds: Mapping[int, str]
    own: str

    def kind(self, mask: torch.Tensor) -> str:
        if len(self.kinds) == 1:
            return next(iter(self.kinds.values()))
        return self.kinds[mask.data_ptr()]


_passing: ContextVar[Packed] = ContextVar("packed")
"""The pass in progress: not every model hands arguments that it does not know down to its attention."""


@contextmanager
def exchanged(config: Any, groups: Sequence[Group | Padded], kinds: Mapping[int, str]) -> Iterator[None]:
    """Within it the model with the (text) configuration calls :func:`attend`."""
    AttentionInterface.register(NAME, attend)
    own = config._attn_implementation
    before = _passing.set(Packed(groups, kinds, own))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _passing.reset(before)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As transformers calls it, with the whole cache as ``key`` and ``value``; ``[1, tokens, heads, width]``."""
    packed = _passing.get()
    # What a model calls "eager" stands in its own module.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    own = ALL_ATTENTION_FUNCTIONS.get_interface(packed.own, eager)

    def function(*states: Any) -> torch.Tensor:
        found: torch.Tensor = own(module, *states, **kwargs)[0]
        return found

    kind = packed.kind(attention_mask)
    parts = [group.attend(function, kind, query, key, value) for group in packed.groups]
    return torch.cat(parts)[None], None
