"""What can be asked for: declared models from Serve, folders of the model store, and what remote providers have."""

import asyncio
import logging
import time
from collections.abc import Iterable

from deployments.remotes import Remotes
from deployments.serve_view import MODEL_DEPLOYMENT, ServeView
from serve_app.config import ModelArgs, Platform, Settings, read_models
from serve_app.domain.catalog import LOCAL_PROVIDER, Catalogue, Entry, ModelInfo, application_name
from serve_app.domain.errors import InvalidConfig
from serve_app.domain.fleet import ProviderStatus
from serve_app.engines import registry
from serve_app.engines.discovery import ModelStore

logger = logging.getLogger(__name__)


class Offer:
    """The catalogue, and where it comes from.

    Args:
        settings: where the model store and Serve's REST API are.
        platform: aliases and providers.
    """

    def __init__(self, settings: Settings, platform: Platform) -> None:
        self._settings = settings
        self._platform = platform
        self._store = ModelStore(settings.hf_model_path, settings.hf_default_task)
        self._defaults: dict[str, ModelArgs] = {}
        self._built: tuple[object, ...] = ()
        self._args: dict[str, ModelArgs] = {}
        """Of discovered models, by id."""
        self.serve = ServeView(settings.ray_dashboard_address.get_secret_value())
        self.remotes = Remotes(settings, platform)
        self.found: dict[str, ModelInfo] = {}
        self.catalogue = Catalogue()
        self.by_application: dict[str, Entry] = {}
        """Local models by their application."""
        self.by_name: dict[str, Entry] = {}
        """All models by their full name."""
        self._former: dict[str, Entry] = {}
        """Models that are offered no more, by full name: their replicas may still have to leave."""
        self.removed: frozenset[str] = frozenset()
        """Full names of the models that an operator took out of the pool: they are not offered."""

    def find(self, full_name: str) -> Entry | None:
        """A model by its full name, also one that is offered no more."""
        return self.by_name.get(full_name) or self._former.get(full_name)

    def behind(self, application: str) -> Entry | None:
        """The local model that an application serves, also one that is offered no more."""
        found = self.by_application.get(application)
        former = (entry for entry in self._former.values() if entry.application == application)
        return found or next(former, None)

    def args_of(self, entry: Entry) -> ModelArgs:
        """The arguments of a local model: those of its application, or the defaults of a discovered one."""
        declared = self.serve.models.get(entry.application)
        if declared is not None:
            return declared
        if entry.id not in self._args:
            self._args[entry.id] = ModelArgs(model=entry.id).over(self._defaults.get(entry.id))
        return self._args[entry.id]

    def name_of(self, full_name: str) -> str:
        """The name that people know a model by."""
        entry = self.by_name.get(full_name)
        return self.catalogue.name_of(entry) if entry else full_name

    def statuses(self, now: float) -> tuple[ProviderStatus, ...]:
        """How the discovery of each provider's models went."""
        local = [entry for entry in self.by_name.values() if not entry.shared]
        usable = sum(1 for entry in local if entry.info is None or entry.info.usable)
        problem = self._store.problem
        own = ProviderStatus(LOCAL_PROVIDER, LOCAL_PROVIDER, "error" if problem else "ok", usable, problem)
        return (own, *self.remotes.statuses(now))

    async def look_at_store(self) -> None:
        """Read the model store and the defaults of discovered models."""
        infos = await asyncio.to_thread(self._store.scan, time.time())
        self._defaults = await asyncio.to_thread(self._read_defaults)
        self.found = {info.id: info for info in infos}

    async def look_at_serve(self) -> bool:
        """Ask Serve what is declared; whether it answered."""
        if not await self.serve.poll():
            return False
        await self.remotes.look(self.serve.upstreams, self.serve.running)
        return True

    def rebuild(self) -> bool:
        """Make the catalogue anew; a declared model wins over its folder. Whether anything has changed."""
        entries = [entry for entry in self._entries() if entry.full_name not in self.removed]
        aliases: dict[str, str | tuple[str, ...]] = dict(self._platform.aliases)
        for args in (*self._defaults.values(), *self.serve.models.values()):
            aliases |= dict.fromkeys(args.aliases, args.model)
        catalogue = Catalogue(entries, aliases)
        built = (catalogue.entries, aliases, self._defaults)
        if built == self._built:
            return False
        self._built = built
        self._args = {}
        self.catalogue = catalogue
        self.by_application = {entry.application: entry for entry in catalogue.entries if not entry.shared}
        before, self.by_name = self.by_name, {entry.full_name: entry for entry in catalogue.entries}
        known = self._former | before
        self._former = {name: entry for name, entry in known.items() if name not in self.by_name and not entry.shared}
        return True

    def _entries(self) -> Iterable[Entry]:
        declared = {args.model: (name, args) for name, args in self.serve.models.items()}
        for name, args in declared.values():
            yield _declared_entry(name, args, self.found.get(args.model))
        for info in self.found.values():
            if info.id not in declared:
                yield Entry(info.id, LOCAL_PROVIDER, application_name(info.id), MODEL_DEPLOYMENT, info)
        yield from self.remotes.entries(time.time())

    def _read_defaults(self) -> dict[str, ModelArgs]:
        """The files in ``configs/models``; a wrong one is reported and leaves the last good ones in force."""
        try:
            return read_models(self._settings.rotunda_home / "configs" / "models")
        except InvalidConfig as error:
            logger.error("the defaults of discovered models stay as they were: %s", error)
            return self._defaults


def _declared_entry(application: str, args: ModelArgs, found: ModelInfo | None) -> Entry:
    info = registry.describe(args.engine, args.model) or found
    missing = None if info else f"its folder is not in the model store ({args.model})"
    info = info or ModelInfo(args.model, "", problem=missing, problem_code="MODEL_NOT_FOUND")
    spec = args.model_dump(mode="json", exclude_unset=True)
    return Entry(args.model, LOCAL_PROVIDER, application, MODEL_DEPLOYMENT, info, declared=True, spec=spec)
