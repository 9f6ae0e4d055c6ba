"""What the router of the fleet remembers across restarts: JSON values by key. One writer, the router."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite

from serve_app.store.engine import Database, whole
from serve_app.store.records import utc_now
from serve_app.store.tables import fleet_memory


class FleetMemory:
    """The part of the store that belongs to the router."""

    _db: Database

    @whole
    async def recall_fleet(self) -> dict[str, Any]:
        """Everything that was remembered."""
        query = select(fleet_memory.c.key, fleet_memory.c.value)
        async with self._db.read() as connection:
            return {key: json.loads(value) for key, value in await connection.execute(query)}

    @whole
    async def remember_fleet(self, changes: Mapping[str, Any]) -> None:
        """Write values over the old ones, in one transaction; None forgets a key."""
        now = utc_now()
        rows = [
            {"key": key, "value": json.dumps(value), "updated_at": now}
            for key, value in changes.items()
            if value is not None
        ]
        gone = [key for key, value in changes.items() if value is None]
        async with self._db.write() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            insert = dialect.insert(fleet_memory)
            newest = {"value": insert.excluded.value, "updated_at": insert.excluded.updated_at}
            if rows:
                await connection.execute(insert.on_conflict_do_update(index_elements=["key"], set_=newest), rows)
            if gone:
                await connection.execute(delete(fleet_memory).where(fleet_memory.c.key.in_(gone)))
