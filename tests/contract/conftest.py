"""Fixtures of the surfaces' tests: a whole platform in this process."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from tests.doubles import LocalPlatform, build_services
from tests.pictures import encoded

MakePlatform = Callable[..., Awaitable[LocalPlatform]]


@pytest.fixture
async def make_platform(tmp_path: Path) -> AsyncIterator[MakePlatform]:
    """Makes platforms with the settings that a test wants, and closes them."""
    made: list[LocalPlatform] = []

    async def make(**settings: object) -> LocalPlatform:
        folder = tmp_path / f"platform{len(made)}"
        folder.mkdir()
        made.append(await build_services(folder, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for platform in made:
        await platform.close()


@pytest.fixture
async def platform(make_platform: MakePlatform) -> LocalPlatform:
    """The platform with default settings."""
    return await make_platform()


@pytest.fixture
async def api(platform: LocalPlatform) -> AsyncIterator[httpx.AsyncClient]:
    """A client of :func:`platform` without a network."""
    async with platform.client() as client:
        yield client


@pytest.fixture
def png() -> str:
    """A tiny image as a data URI."""
    return "data:image/png;base64," + base64.b64encode(encoded("PNG")).decode()
