"""GraphQL over HTTP as its reference implementation judges it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.conformance import clients
from tests.doubles import build_services


async def test_every_audit_of_graphql_http_is_passed(tmp_path: Path):
    platform = await build_services(tmp_path)
    try:
        [results] = await asyncio.to_thread(clients.run, "audit.mjs", await platform.serve() + "/graphql")
    finally:
        await platform.close()
    assert [result for result in results if result["status"] != "ok"] == []
    assert len(results) == 61
