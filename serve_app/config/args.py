"""The arguments of the Serve applications: what stands under ``args`` in ``serve_config.yaml``.

They are plain values without secrets, because Serve's REST API returns them to whoever asks. A key is given by the name
of the environment variable or file that holds it, and read inside the replica.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve_app.config.redaction import looks_like_secret_value, secrets_in
from serve_app.config.report import invalid, problems_of, suggestion
from serve_app.config.table import BY_FIELD, ENVIRONMENT_ONLY
from serve_app.config.values import Bytes, VariableName
from serve_app.domain.catalog import LOCAL_PROVIDER, application_name

NEVER_SECRETS = "Secrets never stand in args; give the name of an environment variable or file that holds it"
OptionValue = bool | int | float | str | None
_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,47}$")


class EngineFields(TypedDict):
    """The fields of :class:`serve_app.engines.base.EngineOptions`, which stands above this package."""

    threads: int
    max_concurrency: int
    max_queue: int
    dtype: str
    context_length: int | None
    max_tokens: int
    extra: tuple[tuple[str, OptionValue], ...]


class Args(BaseModel):
    """Arguments of one application. Unknown fields, and everything that looks like a secret, are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, data: Any) -> Any:
        found = secrets_in(data)
        if found:
            raise ValueError(f"{NEVER_SECRETS} ({', '.join(found)})")
        return data

    @classmethod
    def read(cls, data: Mapping[str, Any] | None, where: str = "args") -> Self:
        """Validate; raises ``InvalidConfig`` whose message lists every problem, each beginning with ``where``."""
        try:
            return cls.model_validate(dict(data or {}))
        except ValidationError as error:
            raise invalid(problems_of(error, cls, where)) from None


class ModelArgs(Args):
    """One local model: an application of its own, with the resources of each replica."""

    model: str
    """Id of the model, ``org/name``: its folder below HF_MODEL_PATH."""
    engine: str = Field(default="auto", pattern=r"^[a-z][a-z0-9_-]*$")
    """Which engine generates: auto, transformers, scripted, or another that is registered."""
    num_cpus: int = Field(default=1, ge=1, le=1024)
    """Whole CPUs of a replica; it computes with as many threads."""
    num_gpus: float = Field(default=0, ge=0, le=64)
    """GPUs of a replica: a fraction below 1, or a whole number."""
    memory_bytes: Annotated[Bytes, Field(ge=1)] | None = None
    """Memory that a replica reserves, for instance 600MB. Absent: computed from the model's files."""
    min_replicas: int = Field(default=0, ge=0, le=1000)
    """Replicas that always run; 1 or more keeps the model in memory, as ``pinned`` does."""
    max_replicas: int = Field(default=1, ge=1, le=1000)
    """Most replicas."""
    initial_replicas: int | None = Field(default=None, ge=0, le=1000)
    """Replicas at the start. Absent: ``min_replicas``."""
    target_ongoing_requests: float = Field(default=8, gt=0, le=100_000)
    """Requests per replica that autoscaling aims at."""
    idle_unload_s: float | None = Field(default=None, gt=0)
    """Seconds without a request after which the model leaves memory. Absent: only when others need it."""
    max_concurrency: int = Field(default=8, ge=1, le=4096)
    """Requests that a replica generates for at once."""
    max_queue: int = Field(default=256, ge=0, le=100_000)
    """Requests that wait in a replica beyond them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights in memory."""
    context_length: int | None = Field(default=None, ge=1)
    """A lower limit than the model's own, in tokens."""
    max_tokens: int = Field(default=1024, ge=1, le=10_000_000)
    """Most new tokens of a request that does not say."""
    aliases: tuple[str, ...] = ()
    """Other names of the model."""
    pinned: bool = False
    """Never leaves memory for another model."""
    frames: bool = True
    """Whether what the streams of an ingress have ready leaves a replica as one message. False: a message for each."""
    graceful_shutdown_timeout_s: float = Field(default=330, ge=0, le=86_400)
    """How long running streams may take to end when a replica leaves; longer than the longest reply."""
    options: dict[str, OptionValue] = Field(default_factory=dict)
    """Options of the engine, by its own documentation."""

    @field_validator("model")
    @classmethod
    def _an_id(cls, value: str) -> str:
        # Ids are names of folders: they may hold more than Hugging Face allows, but nothing that a path obeys.
        parts = value.split("/")
        if any(part in ("", ".", "..") or part != part.strip() or not part.isprintable() for part in parts):
            raise ValueError("it must be an id such as org/name, as `rotunda models --local` lists them")
        return value

    @field_validator("num_gpus")
    @classmethod
    def _schedulable(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("more than one GPU must be a whole number")
        return value

    @field_validator("aliases")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name or name != name.strip() for name in value) or len(set(value)) < len(value):
            raise ValueError("each alias must be a name, and different from the others")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.max_replicas})")
        initial = self.initial_replicas
        if initial is not None and not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(f"initial_replicas ({initial}) is not between min_replicas and max_replicas")
        if self.idle_unload_s is not None and self.stays:
            raise ValueError("idle_unload_s contradicts a model that always stays (pinned, or min_replicas >= 1)")
        return self

    @property
    def application_name(self) -> str:
        """The Serve application of this model."""
        return application_name(self.model)

    @property
    def stays(self) -> bool:
        """Whether the model is never evicted."""
        return self.pinned or self.min_replicas >= 1

    def engine_options(self) -> EngineFields:
        """The fields of ``EngineOptions``, to be spread into it: ``EngineOptions(**args.engine_options())``."""
        return EngineFields(
            threads=self.num_cpus,
            max_concurrency=self.max_concurrency,
            max_queue=self.max_queue,
            dtype=self.dtype,
            context_length=self.context_length,
            max_tokens=self.max_tokens,
            extra=tuple(sorted(self.options.items())),
        )

    def over(self, defaults: ModelArgs | None) -> ModelArgs:
        """These arguments, completed by ``defaults`` wherever a field was not given."""
        if defaults is None:
            return self
        given = defaults.model_dump(exclude_unset=True) | self.model_dump(exclude_unset=True)
        return ModelArgs.read(given, where=f"{self.model}: args over its file in configs/models")


class RemoteArgs(Args):
    """What reaching a remote provider takes."""

    kind: Literal["ollama", "openai"]
    """Which protocol the provider speaks."""
    base_url: str | None = None
    """Its address. Absent: the setting of its kind, OLLAMA_HOST or OPENAI_BASE_URL."""
    api_key_env: VariableName | None = None
    """Name of the environment variable that holds the key."""
    api_key_file: str | None = None
    """File that holds the key."""
    budget_bytes: Annotated[Bytes, Field(ge=1)] | None = None
    """Memory of the provider's own machine that its models may fill. Absent: it decides alone."""
    continue_replies: bool = True
    """Whether its models may go on with replies that broke off. An OpenAI-compatible server is first tried, with
    three short requests, whether it can."""

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None and not _is_address(value):
            raise ValueError("it must be an http:// or https:// address")
        return value.rstrip("/") if value else value

    @field_validator("api_key_file")
    @classmethod
    def _not_the_key(cls, value: str | None) -> str | None:
        if looks_like_secret_value(value):
            raise ValueError("this is not the path of a file; never put the key itself here")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.api_key_env and self.api_key_file:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not re.search(r"\s", value)
        )
    except ValueError:  # the port is no number, or too large a one
        return False


def provider_name(value: str) -> str:
    """A valid name of a remote provider, else ``ValueError``."""
    if not _NAME.match(value):
        raise ValueError("it must be lower-case letters, digits, dash or underscore, 48 at most")
    if value == LOCAL_PROVIDER:
        raise ValueError(f"{LOCAL_PROVIDER} is the name of the local models")
    return value


class UpstreamArgs(RemoteArgs):
    """One remote provider: an application that forwards requests to it."""

    provider: str
    """Name of the provider, as in ``provider/model``."""
    min_replicas: int = Field(default=1, ge=1, le=100)
    """Replicas that always run."""
    max_replicas: int = Field(default=1, ge=1, le=100)
    """Most replicas."""
    max_ongoing_requests: int = Field(default=1000, ge=1, le=100_000)
    """Requests that a replica forwards at once."""

    _name = field_validator("provider")(provider_name)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.max_replicas})")
        return self

    @property
    def application_name(self) -> str:
        """The Serve application of this provider."""
        return f"upstream-{self.provider}"


class GatewayArgs(Args):
    """The gateway: ingress and router."""

    platform: str | None = None
    """Path of the platform file, relative to ROTUNDA_HOME. Absent: ``configs/platform.yaml`` when it exists."""
    ingress_min_replicas: int = Field(default=2, ge=1, le=1000)
    """Ingress replicas that always run; the second keeps requests whole when one is killed."""
    ingress_max_replicas: int = Field(default=4, ge=1, le=1000)
    """Most ingress replicas."""
    settings: dict[str, OptionValue] = Field(default_factory=dict)
    """Settings by their lower-case names, stronger than the environment."""

    @field_validator("settings")
    @classmethod
    def _known(cls, value: dict[str, OptionValue]) -> dict[str, OptionValue]:
        check_overrides(value)
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.ingress_min_replicas, self.ingress_max_replicas
        if low > high:
            raise ValueError(f"ingress_min_replicas ({low}) is more than ingress_max_replicas ({high})")
        return self

    def platform_path(self) -> Path | None:
        """The platform file that was named."""
        return Path(self.platform) if self.platform else None


def check_overrides(values: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for settings that do not exist, are secrets, or may come from the environment only."""
    for name in values:
        row = BY_FIELD.get(name)
        if row is None:
            raise ValueError(f"the setting {name} is unknown; {suggestion(name, BY_FIELD)}")
        if row.secret:
            raise ValueError(f"{NEVER_SECRETS} ({row.name})")
        if name in ENVIRONMENT_ONLY:
            raise ValueError(f"{name} is read from the environment only, because the files are found through it")
