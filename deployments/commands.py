"""What operators want of the router."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from deployments.demand import parts_of
from deployments.offer import Offer
from deployments.states import States
from serve_app.domain.catalog import RESIDENT, Entry
from serve_app.domain.errors import InvalidInput, error_from_dict
from serve_app.domain.planning import Verdict, evictables
from serve_app.domain.rotation_effects import Refuse
from serve_app.domain.rotation_events import EmergencyCleanup, Pin, Request, Unload
from serve_app.domain.routing import Ask, choose
from serve_app.rotor import Rotor

MODEL_ACTIONS = ("load", "unload", "pin", "plan")
ACTIONS = (*MODEL_ACTIONS, "set_rotation", "emergency_cleanup")


class Commands:
    """See :meth:`serve_app.backend.Router.command` for the actions, their arguments and answers.

    Args:
        offer: finds models by name.
        rotor: carries out.
        states: the fleet as it is now.
        changed: called when an operator has changed which models are offered.
    """

    def __init__(self, offer: Offer, rotor: Rotor, states: Callable[[], States], changed: Callable[[], None]) -> None:
        self._offer = offer
        self._rotor = rotor
        self._states = states
        self._changed = changed

    async def run(self, action: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Raises what the action does, and ``InvalidInput`` for one that does not exist."""
        if action == "set_rotation":
            return self._set_rotation(arguments.get("add") or (), arguments.get("remove") or ())
        if action == "emergency_cleanup":
            return self._clean_up()
        if action not in MODEL_ACTIONS:
            raise InvalidInput(f"There is no command {action!r}; the commands are {', '.join(ACTIONS)}.")
        entry = self._offer.catalogue.resolve(model)
        if action == "plan":
            return await self._plan(entry)
        if action == "load":
            await self._load(entry, model)
        elif action == "unload":
            await self._unload(entry)
        else:
            self._rotor.tell(Pin(entry.full_name, bool(arguments.get("pinned", True))))
        state, reason = self._states().state_of(entry)
        return {"model": self._offer.catalogue.name_of(entry), "state": state.value, "reason": reason}

    async def _plan(self, entry: Entry) -> dict[str, Any]:
        if self._is_elsewhere(entry):
            resident = self._states().state_of(entry)[0] in RESIDENT
            reason = "it is in memory" if resident else f"{entry.provider} makes room for it by itself"
            verdict = Verdict.READY if resident else Verdict.FITS
            return {"model": self._offer.catalogue.name_of(entry), "verdict": verdict.value, "reason": reason}
        plan = self._rotor.rotation.plan(entry.full_name).to_json()
        parts = {} if entry.shared else await asyncio.to_thread(parts_of, self._offer.args_of(entry), entry.info)
        evicts = [self._offer.name_of(name) for name in plan["evicts"]]
        return {**plan, "model": self._offer.catalogue.name_of(entry), "evicts": evicts, "bytes": parts}

    async def _load(self, entry: Entry, name: str) -> None:
        choose(Ask("load", name, frozenset()), self._offer.catalogue, self._states())
        if self._is_elsewhere(entry):
            await self._offer.remotes.command("load", entry)
            return
        request = Request(f"load-{secrets.token_hex(8)}", (entry.full_name,), "", caller="operator", lease=False)
        answer = self._rotor.ask(request)
        if isinstance(answer, Refuse):
            raise error_from_dict(answer.error)

    def _is_elsewhere(self, entry: Entry) -> bool:
        """Whether the memory of a model is the affair of its provider alone."""
        row = self._rotor.rotation.state.residency.rows.get(entry.full_name)
        return row is not None and not row.model.resides

    async def _unload(self, entry: Entry) -> None:
        if self._rotor.rotation.pinned(entry.full_name):
            raise InvalidInput(f"{entry.id} is pinned: it stays in memory until it is unpinned.", entry.provider)
        if self._is_elsewhere(entry):
            await self._offer.remotes.command("unload", entry)
        else:
            self._rotor.tell(Unload(entry.full_name))

    def _set_rotation(self, add: Any, remove: Any) -> dict[str, Any]:
        out = {self._offer.catalogue.resolve(name).full_name for name in remove}
        back = {self._known(name) for name in add}
        self._offer.removed = (self._offer.removed | out) - back
        self._changed()
        return {"removed": sorted(self._offer.removed)}

    def _known(self, name: str) -> str:
        """The full name of a model that is offered, or was before it was removed."""
        shortened = {full.partition("/")[2]: full for full in self._offer.removed}
        if name in self._offer.removed:
            return name
        return shortened[name] if name in shortened else self._offer.catalogue.resolve(name).full_name

    def _clean_up(self) -> dict[str, Any]:
        victims = sorted(victim.name for victim in evictables(self._rotor.rotation.state))
        self._rotor.tell(EmergencyCleanup())
        return {"evicting": [self._offer.name_of(name) for name in victims]}
