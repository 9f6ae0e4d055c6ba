"""How much one document may ask for, judged before any rule that could be slow looks at it.

Every fragment is measured once, however often it is spread, so the judgement is linear in the document. Rules that
follow the spreads instead double their work with each nested fragment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionNode,
    SelectionSetNode,
)
from strawberry.extensions import ValidationCache

MAX_TOKENS = 1_000
MAX_DEPTH = 12
MAX_ALIASES = 30
MAX_SELECTIONS = 600
"""Of a document with its fragments written out. The standard rules compare selections pair by pair."""
INTROSPECTION_DEPTH = 8
"""Levels that a selection of ``__schema`` or ``__type`` may have on top: types of types nest by nature."""

_INTROSPECTION = frozenset({"__schema", "__type"})


@dataclass(frozen=True, slots=True)
class Size:
    """What a selection asks for: nested levels of fields, aliased fields, and selections of every kind."""

    depth: int = 0
    aliases: int = 0
    selections: int = 0

    def beside(self, other: Size) -> Size:
        return Size(max(self.depth, other.depth), self.aliases + other.aliases, self.selections + other.selections)

    def problems(self) -> list[str]:
        """What exceeds the limits, in plain words."""
        measured = (
            ("levels deep", self.depth, MAX_DEPTH),
            ("aliases", self.aliases, MAX_ALIASES),
            ("selections", self.selections, MAX_SELECTIONS),
        )
        return [
            f"The query has too many {what}; at most {most} are allowed, its fragments written out."
            for what, size, most in measured
            if size > most
        ]


class Measure:
    """Sizes of the definitions of one document."""

    def __init__(self, document: DocumentNode) -> None:
        self._document = document
        self._fragments = {
            node.name.value: node for node in document.definitions if isinstance(node, FragmentDefinitionNode)
        }
        self._sizes: dict[str, Size] = {}

    def whole(self) -> Size:
        """The deepest level of any operation, and the rest summed over the operations and fragments."""
        total = Size()
        for node in self._document.definitions:
            if isinstance(node, FragmentDefinitionNode):
                # Its depth counts where it is spread; the standard rules look at it by itself as well.
                total = total.beside(replace(self._fragment(node.name.value), depth=0))
            elif isinstance(node, OperationDefinitionNode):
                total = total.beside(self._selections(node.selection_set))
        return total

    def _fragment(self, name: str) -> Size:
        size = self._sizes.get(name)
        if size is None:
            # A cycle meets this zero; the rule against cycles reports it.
            self._sizes[name] = Size()
            node = self._fragments.get(name)
            size = self._sizes[name] = self._selections(node.selection_set) if node else Size()
        return size

    def _selections(self, node: SelectionSetNode | None) -> Size:
        total = Size()
        for selection in node.selections if node else ():
            total = total.beside(self._selection(selection))
        return total

    def _selection(self, node: SelectionNode) -> Size:
        match node:
            case FieldNode():
                below = self._selections(node.selection_set)
                name = node.name.value
                depth = max(1, below.depth + 1 - (INTROSPECTION_DEPTH if name in _INTROSPECTION else 0))
                return Size(depth, below.aliases + (node.alias is not None), below.selections + 1)
            case FragmentSpreadNode():
                below = self._fragment(node.name.value)
            case InlineFragmentNode():
                below = self._selections(node.selection_set)
            case _:
                return Size()
        return replace(below, selections=below.selections + 1)


class DocumentLimits(ValidationCache):
    """Refuses documents that are too large, before the standard validation, which is then done once for each of the
    last documents: clients send the same few again and again, and the rules take milliseconds."""

    def on_operation(self) -> Iterator[None]:
        self.execution_context.parse_options["max_tokens"] = MAX_TOKENS
        yield

    def on_validate(self) -> Iterator[None]:
        document = self.execution_context.graphql_document
        problems = Measure(document).whole().problems() if document else []
        if problems or not document:
            # Errors that are already there keep the schema from running its own rules.
            self.execution_context.pre_execution_errors = [GraphQLError(problem) for problem in problems] or None
            yield
        else:
            yield from super().on_validate()
