"""A reply that another model began, as remote servers can be asked to go on with it: by its text alone."""

from __future__ import annotations

from dataclasses import replace

from serve_app.domain.continuation import Continuation
from serve_app.domain.generation import Accepted, Finish, FinishReason, GenerationRequest, Item, Usage


def spent_whole(request: GenerationRequest) -> tuple[Item, ...]:
    """The whole answer to a request whose reply has all the tokens that it may have; empty for every other one."""
    begun, most = request.continuation, request.options.max_tokens
    if begun is None or most is None or begun.spent < most:
        return ()
    return Accepted(0), Finish(FinishReason.LENGTH, Usage())


def by_text(request: GenerationRequest, begun: Continuation) -> GenerationRequest:
    """The request for what follows upon the text, within what is left of ``max_tokens``.

    Raises:
        CapabilityMissing: only the model that began the reply can go on with it.
    """
    text, most = begun.read_by("").text, request.options.max_tokens
    options = request.options if most is None else replace(request.options, max_tokens=max(1, most - begun.spent))
    request = replace(request, options=options)
    return request.begun(text) if text.strip() else replace(request, continuation=None)
