"""The library's decorators with types: called with arguments, they would make what they decorate untyped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import strawberry
from strawberry.types.field import StrawberryField

Decorator = Callable[[Callable[..., Any]], StrawberryField]


def field(description: str) -> Decorator:
    """A field of a type, resolved by the decorated function."""

    def decorate(resolver: Callable[..., Any]) -> StrawberryField:
        return strawberry.field(resolver, description=description)

    return decorate


def mutation(description: str, deprecation_reason: str | None = None) -> Decorator:
    """A mutation."""

    def decorate(resolver: Callable[..., Any]) -> StrawberryField:
        return strawberry.mutation(resolver, description=description, deprecation_reason=deprecation_reason)

    return decorate


def subscription(description: str) -> Decorator:
    """A subscription; the decorated function is an asynchronous generator."""

    def decorate(resolver: Callable[..., Any]) -> StrawberryField:
        return strawberry.subscription(resolver, description=description)

    return decorate
