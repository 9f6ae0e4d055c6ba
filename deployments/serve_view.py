"""What Serve's REST API says: which models and providers are declared, what runs, and which replicas there are."""

import asyncio
import logging
from typing import Any, TypeVar

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from serve_app.config import ModelArgs, UpstreamArgs
from serve_app.domain.errors import InvalidConfig

logger = logging.getLogger(__name__)

AnyArgs = TypeVar("AnyArgs", ModelArgs, UpstreamArgs)

MODEL_DEPLOYMENT = "model"
MODEL_BUILDER = "deployments.model:build"
UPSTREAM_BUILDER = "deployments.upstream:build"


class ServeView:
    """What Serve's REST API says of the applications: which models are declared, and what runs.

    Args:
        address: of Ray's dashboard.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: ServeSubmissionClient | None = None
        self.models: dict[str, ModelArgs] = {}
        self.upstreams: dict[str, UpstreamArgs] = {}
        self.running: frozenset[str] = frozenset()
        self.replicas: dict[str, frozenset[str]] = {}
        """The replicas of each application that runs, whatever state they are in."""
        self.notes: tuple[str, ...] = ("Serve's REST API was not asked yet.",)

    async def poll(self) -> bool:
        """Ask once; what was known stays when there is no answer (False), and the notes say so."""
        try:
            details = await asyncio.to_thread(self._fetch)
        except Exception as error:
            self.notes = (f"Serve's REST API at {self._address} does not answer; the models are those last seen.",)
            logger.warning("Serve's REST API does not answer: %r", error)
            return False
        self.notes = ()
        applications: dict[str, Any] = details.get("applications") or {}
        self.running = frozenset(applications)
        self.replicas = {name: _replicas(app) for name, app in applications.items()}
        self.models = {name: args for name, app in applications.items() if (args := _model_args(name, app))}
        self.upstreams = {
            name: found
            for name, app in applications.items()
            if (found := _declared_args(name, app, UPSTREAM_BUILDER, UpstreamArgs))
        }
        return True

    def _fetch(self) -> dict[str, Any]:
        if self._client is None:
            self._client = ServeSubmissionClient(self._address)
        return dict(self._client.get_serve_details())


def _declared_args(name: str, application: dict[str, Any], builder: str, kind: type[AnyArgs]) -> AnyArgs | None:
    """The arguments of an application that stands in ``serve_config.yaml`` with this builder; else None."""
    config = application.get("deployed_app_config") or {}
    if config.get("import_path") != builder or application.get("status") == "DELETING":
        return None
    try:
        return kind.read(config.get("args"), name)
    except InvalidConfig as error:
        logger.warning("%s", error)
        return None


def _model_args(name: str, application: dict[str, Any]) -> ModelArgs | None:
    """The arguments of a declared model application; None for every other one."""
    args = _declared_args(name, application, MODEL_BUILDER, ModelArgs)
    if args is None:
        return None
    config = application["deployed_app_config"]
    overrides = [item for item in config.get("deployments") or () if item.get("name") == MODEL_DEPLOYMENT]
    scaling = (overrides[0].get("autoscaling_config") or {}) if overrides else {}
    known = {key: scaling[key] for key in ("min_replicas", "max_replicas") if scaling.get(key) is not None}
    return args.model_copy(update=known)


def _replicas(application: dict[str, Any]) -> frozenset[str]:
    deployments: dict[str, Any] = application.get("deployments") or {}
    return frozenset(replica["replica_id"] for one in deployments.values() for replica in one.get("replicas") or ())
