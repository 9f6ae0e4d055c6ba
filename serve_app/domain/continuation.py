"""A reply that broke off, as whoever goes on with it must know it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from serve_app.domain.errors import CapabilityMissing, InvalidInput


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a reply has come to so far; the next attempt yields only what follows.

    Two ways lead on. The same model at the same ``revision`` reads the prompt and exactly ``token_ids``, and goes on as
    if nothing had happened: equal text when greedy, and when sampled too, because draw number ``n`` of a reply depends
    on the request's seed and ``n`` alone (``GenerationRequest.draw_seed``). Every other one reads ``text`` as the
    beginning of its own answer.

    Offsets are code points of the answer; reasoning and tool calls have none. ``Delta.token_ids`` of all deltas that
    one attempt gave away, joined, are ``token_ids``: they end where a delta ended, and made the answer from ``earlier``
    on, so the next delta belongs at ``len(text)``. What was held back (a character's first bytes, what may become a
    stop string) was in no delta, and is made again.

    Attributes:
        text: the whole answer that was given away, whoever made it. Its last blanks are not shown to a model that goes
            on by text, which may make them again (:mod:`serve_app.domain.seam` leaves those out).
        token_ids: of the last model's own part of the reply, reasoning included; empty where it tells none.
        revision: of the model that made ``token_ids`` (``Accepted.revision``).
        earlier: code points of ``text`` that other models made before ``token_ids``.
        spent: tokens of the reply so far, whoever made them; they count towards ``max_tokens``.
        exact: whether only the model of ``token_ids`` may go on (:meth:`read_by` refuses every other one).
    """

    text: str
    token_ids: tuple[int, ...] = ()
    revision: str | None = None
    earlier: int = 0
    spent: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.earlier <= len(self.text):
            raise InvalidInput(f"earlier is {self.earlier}; the text has {len(self.text)} characters.")
        if self.spent < len(self.token_ids):
            raise InvalidInput(f"spent is {self.spent}, less than the {len(self.token_ids)} tokens that are given.")

    def read_by(self, revision: str) -> Continuation:
        """What a model of ``revision`` (empty: unknown) goes on with: without ids that are not its own.

        Raises:
            CapabilityMissing: the reply can be continued only by its ids, and they are another model's.
        """
        if self.token_ids and revision and self.revision == revision:
            return self
        if self.exact:
            raise CapabilityMissing("Only the model that began this reply can go on with it.")
        return replace(self, token_ids=(), revision=None, earlier=len(self.text))

    @property
    def beginning(self) -> str:
        """What stands before ``token_ids`` as text to be read."""
        return self.text[: self.earlier] if self.token_ids else self.text

    @property
    def spent_before(self) -> int:
        """Tokens spent before ``token_ids``."""
        return self.spent - len(self.token_ids)
