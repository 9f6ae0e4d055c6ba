"""The router's side of remote providers: which there are, their applications, and what their replicas say."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping

from ray import serve
from ray.serve import RunTarget

from deployments import upstream
from deployments.handles import Failure
from deployments.lines import Lines
from serve_app.config import Platform, Settings, UpstreamArgs
from serve_app.domain.catalog import Catalogue, Entry
from serve_app.domain.errors import error_from_dict
from serve_app.domain.fleet import Fleet, ProviderStatus
from serve_app.domain.upstreams import UPSTREAM_DEPLOYMENT, UpstreamReport, Upstreams, put_up_and_take_down
from serve_app.providers import registry

logger = logging.getLogger(__name__)


class Remotes:
    """The remote providers: those of ``serve_config.yaml``, of the platform file, and of the settings, in this order.

    Args:
        settings: may name servers.
        platform: may hold providers.
    """

    def __init__(self, settings: Settings, platform: Platform) -> None:
        implied = {args.provider: args for args in registry.implied(settings)}
        self._configured = implied | {args.name: args.upstream() for args in platform.providers}
        self._declared: Mapping[str, UpstreamArgs] = {}
        self._put_up: set[str] = set()
        self.standing: dict[str, str] = {}
        """Applications that this router or an earlier one put up, with their arguments as JSON."""
        self._upstreams = Upstreams()
        self._lines = Lines()

    def _providers(self) -> dict[str, tuple[str, UpstreamArgs, bool]]:
        """Application, arguments and whether it is declared, by name of the provider."""
        found = {name: (args.application_name, args, False) for name, args in self._configured.items()}
        return found | {args.provider: (application, args, True) for application, args in self._declared.items()}

    async def look(self, declared: Mapping[str, UpstreamArgs], running: Collection[str]) -> None:
        """Take over what Serve says is declared; put up the applications of the other providers once, and take away
        those of providers that are configured no more."""
        self._declared = declared
        wanted = {name: args for name, args, is_declared in self._providers().values() if not is_declared}
        said = {name: args.model_dump_json(exclude_unset=True) for name, args in wanted.items()}
        missing, stale = put_up_and_take_down(said, self.standing, running, declared)
        for name in stale:
            logger.info("the application %s goes: its provider is configured no more", name)
            await asyncio.to_thread(serve.delete, name, _blocking=False)
            del self.standing[name]
        await self._put_up_all({name: wanted[name] for name in missing - self._put_up})
        self.standing |= {name: said[name] for name in self._put_up & said.keys()}

    async def _put_up_all(self, missing: Mapping[str, UpstreamArgs]) -> None:
        if not missing:
            return
        self._put_up |= missing.keys()
        targets = [RunTarget(upstream.build(args), name=name, route_prefix=None) for name, args in missing.items()]
        try:
            await asyncio.to_thread(serve.run_many, targets, wait_for_applications_running=False)
        except Exception:
            # Their status says that they do not answer; the next look tries again, and nothing else is held up.
            self._put_up -= missing.keys()
            logger.exception("%s could not be put up", ", ".join(missing))
        else:
            logger.info("put up %s", ", ".join(missing))

    def hear(self, report: UpstreamReport, fleet: Fleet, now: float) -> bool:
        """Take a heartbeat; the answer says whether the list of models is known."""
        known = self._upstreams.hear(report, now)
        for each in self._upstreams.model_reports(self.entries(now), report.application, now):
            fleet.hear(each, now)
        return known

    def forget(self, application: str, replica_id: str) -> None:
        self._upstreams.forget(application, replica_id)

    def entries(self, now: float) -> Iterator[Entry]:
        """The models of every provider."""
        for name, (application, _, declared) in self._providers().items():
            yield from self._upstreams.entries(name, application, declared, now)

    def statuses(self, now: float) -> tuple[ProviderStatus, ...]:
        """How each provider is; one that cannot be asked hides no other."""
        return tuple(
            self._upstreams.status(name, args.kind, application, now)
            for name, (application, args, _) in self._providers().items()
        )

    def problems(self, now: float) -> dict[str, str | None]:
        """Why each provider cannot be reached; None for one that can."""
        return {
            name: self._upstreams.problem(application, now) for name, (application, _, _) in self._providers().items()
        }

    def budgets(self, now: float) -> dict[str, int | None]:
        """The providers that say what is in their memory, each with the bytes that its models may fill, if limited."""
        return {
            name: args.budget_bytes
            for name, (application, args, _) in self._providers().items()
            if any(report.residents is not None for report in self._upstreams.of(application, now))
        }

    def reports(self, application: str, now: float) -> list[UpstreamReport]:
        """The last reports of the replicas of a provider."""
        return self._upstreams.of(application, now)

    def with_unlisted(self, catalogue: Catalogue, names: Iterable[str], now: float) -> Catalogue:
        """The catalogue with those models of ``names`` that only a provider that cannot be asked would know.

        Its models cannot be listed, but a request for one of them deserves its fallbacks, and the true reason.
        """
        unlisted = []
        for target in (target for name in names for target in catalogue.aliases.get(name, (name,))):
            provider, _, model = target.partition("/")
            application, _, declared = self._providers().get(provider, ("", None, False))
            reason = self._upstreams.problem(application, now) if application and model else None
            known = {entry.full_name for entry in catalogue.entries}
            if reason and f"{provider}/{model}" not in known:
                deployment = UPSTREAM_DEPLOYMENT
                unlisted.append(
                    Entry(model, provider, application, deployment, None, declared, reason=reason, shared=True)
                )
        return Catalogue([*catalogue.entries, *unlisted], catalogue.aliases) if unlisted else catalogue

    async def command(self, action: str, entry: Entry) -> None:
        """``load`` or ``unload`` a model where it lives; raises what the provider answers."""
        with self._lines.calling(entry) as handle:
            answer = await getattr(handle, action).remote(entry.id)
        if isinstance(answer, Failure):
            raise error_from_dict(answer.error)
