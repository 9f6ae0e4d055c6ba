"""A model's tokens as the bytes they stand for, and in the form that the grammar library (llguidance) works with."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from serve_app.domain.errors import CapabilityMissing


class Vocabulary:
    """The tokens of one model. Safe for threads.

    Args:
        tokenizer: of transformers.
        size: the logits' number.
        ends: the tokens that end a reply.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._size = max(size, len(tokenizer))
        self.ends = frozenset(ends)
        self.stand_in = None if self.ends else max(tokenizer.all_special_ids, default=len(tokenizer) - 1)
        """What the library takes for the end where the model has none; it must never be drawn."""
        self._lock = threading.Lock()
        self._library: Any = None

    def __repr__(self) -> str:
        return f"Vocabulary({self._size} tokens, {len(self.ends)} ends)"

    @property
    def library(self) -> Any:
        """The ``llguidance.LLTokenizer``; made when it is first wanted (milliseconds to a second).

        Raises:
            CapabilityMissing: the tokenizer is none of the fast ones.
        """
        with self._lock:
            if self._library is None:
                self._library = self._make()
            return self._library

    def _make(self) -> Any:
        from llguidance.hf import from_tokenizer

        ends = sorted(self.ends) if self.stand_in is None else [self.stand_in]
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._size, eos_token=ends)
        except Exception as fault:  # the library raises nothing narrower
            raise CapabilityMissing("This model's tokenizer does not allow replies of a given form.") from fault

    def spell(self, token: int) -> bytes:
        """The token's bytes; control tokens as they are written."""
        try:
            return bytes(self.library.decode_bytes([token]))
        except CapabilityMissing:
            return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()
