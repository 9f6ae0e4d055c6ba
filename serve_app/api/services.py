"""What the surfaces are made of; filled in by the composition root (deployments/ingress.py) and by tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property

from serve_app.api.access import Access
from serve_app.api.images import ImageIntake
from serve_app.config import Settings
from serve_app.gateway import Gateway
from serve_app.sessions import Sessions
from serve_app.store.archive import ImageArchive
from serve_app.store.images import ImageFiles
from serve_app.store.passwords import Passwords
from serve_app.store.store import Store
from serve_app.telemetry.spans import Kept
from serve_app.telemetry.tracing import Tracing


@dataclass(frozen=True)
class Services:
    """``problems`` answers why the server is not ready, in plain words; empty when it is. ``kept``: recorded traces."""

    settings: Settings
    store: Store
    gateway: Gateway
    sessions: Sessions
    files: ImageFiles
    access: Access
    problems: Callable[[], Awaitable[list[str]]]
    tracing: Tracing = field(default_factory=Tracing.off)
    kept: Kept | None = None

    @property
    def passwords(self) -> Passwords:
        return self.access.passwords

    @cached_property
    def intake(self) -> ImageIntake:
        return ImageIntake(self.settings, self.files, self.archive)

    @cached_property
    def archive(self) -> ImageArchive:
        return ImageArchive(self.store, self.files)
