"""The state of every model at one moment: the rotation's word where it decides, else what the replicas said."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.domain.catalog import Entry, ModelState
from serve_app.domain.fleet import Fleet
from serve_app.domain.rotation import Rotation


@dataclass(frozen=True, slots=True)
class States:
    """What routing and views must know of the fleet; ``now`` is on the fleet's clock."""

    rotation: Rotation
    fleet: Fleet
    now: float

    def state_of(self, entry: Entry) -> tuple[ModelState, str | None]:
        """The model's state and, when there is one to give, the reason for it."""
        row = self.rotation.state.residency.rows.get(entry.full_name)
        if entry.reason is not None:
            return ModelState.UNAVAILABLE, entry.reason
        if row is None or not row.model.resides:
            return self.fleet.state_of(entry, self.now)
        return self.rotation.state_of(entry.full_name)

    def expected_s(self, entry: Entry) -> float:
        """See :meth:`serve_app.domain.routing.FleetState.expected_s`."""
        return self.fleet.expected_s(entry, self.now)

    def failure_of(self, entry: Entry) -> Mapping[str, Any] | None:
        """The error that every call to the model would end with until its files change; None when it may heal."""
        row = self.rotation.state.residency.rows.get(entry.full_name)
        if row is None or row.failure is None or row.failure.next_try is not None:
            return None
        return row.failure.error
