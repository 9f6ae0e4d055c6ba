"""The kinds of providers by name. One registers with a line here; a kind is imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from serve_app.config import Settings, UpstreamArgs
from serve_app.domain.errors import InvalidConfig
from serve_app.providers.base import Provider

KINDS = {
    "ollama": "serve_app.providers.ollama",
    "openai": "serve_app.providers.openai",
}
"""Each kind's module. Its ``create(args, settings)`` makes a provider, where secrets may be read; ``implied(settings)``
are the arguments of the one that the settings alone ask for, or None."""


def create(args: UpstreamArgs, settings: Settings) -> Provider:
    """Make the provider that ``args`` describe; it connects when it is first used.

    Raises:
        InvalidConfig: there is no such kind, no address, or no key where one was promised.
    """
    provider: Provider = _module(args.kind).create(args, settings)
    return provider


def implied(settings: Settings) -> tuple[UpstreamArgs, ...]:
    """The providers that exist because a setting names their server, without an entry anywhere."""
    found = (_module(kind).implied(settings) for kind in KINDS)
    return tuple(args for args in found if args is not None)


def _module(kind: str) -> ModuleType:
    if kind not in KINDS:
        raise InvalidConfig(f"There is no kind of provider {kind!r}; there are {', '.join(sorted(KINDS))}.")
    return importlib.import_module(KINDS[kind])
