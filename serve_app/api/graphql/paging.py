"""Which part of a list is wanted: arguments that several fields share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import strawberry

from serve_app.domain.errors import InvalidInput

MAX_PAGE = 500

Limit = Annotated[int | None, strawberry.argument(description=f"At most so many, 1 to {MAX_PAGE}.")]
Last = Annotated[
    int | None,
    strawberry.argument(description=f"Only so many of the last ones, 1 to {MAX_PAGE}; with `before`, those before it."),
]
After = Annotated[str | None, strawberry.argument(description="Only what comes after the message of this id.")]
Before = Annotated[
    str | None,
    strawberry.argument(description="Only what comes before the message of this id; a limit keeps the last ones."),
]
NextCursor = Annotated[str | None, strawberry.argument(description="The nextCursor of the page before.")]


@dataclass(frozen=True, slots=True)
class MessagePage:
    """Part of a conversation, as it was asked for."""

    limit: int | None = None
    last: int | None = None
    after: str | None = None
    before: str | None = None

    def checked_limit(self) -> int | None:
        """How many at most. Raises InvalidInput for arguments that contradict each other or are out of range."""
        if self.last is not None and (self.limit is not None or self.after is not None):
            raise InvalidInput("last goes with neither limit nor after.")
        return page_size(self.limit if self.last is None else self.last)


def page_size(limit: int | None) -> int | None:
    """A checked limit; None stays None. Raises InvalidInput out of 1..MAX_PAGE."""
    if limit is not None and not 1 <= limit <= MAX_PAGE:
        raise InvalidInput(f"limit is {limit}; it must lie in [1, {MAX_PAGE}].")
    return limit
