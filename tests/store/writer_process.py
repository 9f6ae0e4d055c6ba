"""One of the processes of ``test_two_processes_write_one_database``."""

from __future__ import annotations

import asyncio
import json
import sys

from serve_app.domain.errors import RotundaError
from serve_app.store import NewSession, Store, new_id


async def main(url: str, name: str) -> None:
    store = await Store.open(url)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    outcomes: list[str] = []
    for id in ("shared", *(f"race {number}" for number in range(30))):
        try:
            await store.create_conversation(id, "Tab")
        except RotundaError as error:
            if "already exists" not in error.message:
                raise

    async def race(number: int) -> None:
        new = NewSession(new_id(), f"race {number}", "m", "p", owner=name, ttl_s=600)
        try:
            await store.begin_reply(new, text="hello")
            outcomes.append("begun")
        except RotundaError as error:
            outcomes.append(type(error).__name__)

    async def add() -> None:
        for number in range(60):
            await store.add_message("shared", f"{name} {number}", "user")
            outcomes.append("added")

    await asyncio.gather(add(), *(race(number) for number in range(30)))
    key = await store.signing_key()
    await store.close()
    sys.stdout.write(json.dumps({"outcomes": outcomes, "signing_key": key.hex()}))


asyncio.run(main(*sys.argv[1:]))
