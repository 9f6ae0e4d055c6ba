"""The settings of a process, as one table.

Each field of :class:`Settings` is one environment variable: the field's name in capitals. Its :func:`setting` holds all
that is known about it; the report of wrong values, ``docs/configuration.md`` and ``.env.example`` come from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from serve_app.config.redaction import SecretUrl
from serve_app.config.values import DatabaseUrl, Hosts, HttpUrl, Keys, MediaTypes, OllamaHost, Origins
from serve_app.domain.catalog import Task

DAY_MS = 86_400_000


def setting(
    group: str,
    default: Any,
    meaning: str,
    *,
    wrong: str,
    unit: str = "",
    allowed: str = "",
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
) -> Any:
    """One row of the table. ``wrong`` is an example that is refused; ``allowed`` completes what the type says."""
    limits = {name: value for name, value in (("ge", low), ("le", high)) if value is not None}
    about = {"group": group, "unit": unit, "wrong": wrong, "allowed": allowed, "secret": secret}
    return Field(default=default, description=meaning, json_schema_extra=about, **limits)  # type: ignore[call-overload]


MODELS, PROVIDERS, STORE, ROTATION = "Models", "Providers", "Store", "Rotation"
STREAMS, IMAGES, ACCESS, TRACES, CLUSTER = "Streams", "Images", "Access", "Traces", "Cluster"
_URL = "an http:// or https:// address"
_DATABASE = "sqlite+aiosqlite:///<file> or postgresql+asyncpg://<user>:<password>@<host>/<database>"


class Settings(BaseModel):
    """Every setting, validated and immutable. Made by :func:`serve_app.config.load`; tests may construct it directly.

    Paths are absolute when they come from ``load``. Raises ``pydantic.ValidationError`` when constructed with values
    that are out of range; ``load`` turns all of them into one readable report.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False, use_attribute_docstrings=False
    )

    hf_model_path: Path = setting(
        MODELS,
        Path("models/huggingface"),
        "Folder of the local models, one `org/name` below it each. Created when missing; a folder that cannot be used "
        "is reported in the log and the default is used.",
        wrong="a\0b",
        allowed="a folder",
    )
    hf_max_cached_models: int = setting(
        MODELS, 0, "Most local models that hold memory at once; 0 = only bytes decide.", wrong="-1", low=0, high=10_000
    )
    hf_default_task: Task = setting(
        MODELS, Task.TEXT_GENERATION, "What a local model is for when its files do not say.", wrong="text-genration"
    )
    hf_enable_gpu: bool = setting(
        MODELS, True, "Whether local models may use GPUs where the cluster has them.", wrong="perhaps"
    )
    hf_model_timeout_ms: int = setting(
        MODELS,
        300_000,
        "Longest time for one whole reply, local or remote, from when its model was granted.",
        unit="ms",
        wrong="5 minutes",
        low=100,
        high=DAY_MS,
    )
    hf_load_timeout_ms: int = setting(
        MODELS,
        120_000,
        "Longest time for one load of a model, and until a remote server begins its answer.",
        unit="ms",
        wrong="0",
        low=100,
        high=DAY_MS,
    )
    connect_timeout_ms: int = setting(
        MODELS,
        5_000,
        "Longest time to connect to the server of a remote provider.",
        unit="ms",
        wrong="0",
        low=1,
        high=600_000,
    )
    first_token_timeout_ms: int = setting(
        MODELS,
        60_000,
        "Longest time from when a loaded model takes a request to its first token.",
        unit="ms",
        wrong="soon",
        low=1,
        high=DAY_MS,
    )
    idle_timeout_ms: int = setting(
        MODELS, 60_000, "Longest silence between two tokens of a reply.", unit="ms", wrong="0", low=1, high=DAY_MS
    )
    hf_stream_chunk_size: int = setting(
        MODELS,
        32,
        "Most tokens in one streamed event; 1 = an event for each.",
        unit="tokens",
        wrong="0",
        low=1,
        high=4096,
    )
    default_model: str | None = setting(
        MODELS,
        None,
        "Model of a conversation that names none. Unset: the only chat model there is, else the request is refused.",
        wrong="two words",
        allowed="the name or alias of a model",
    )
    ollama_host: OllamaHost | None = setting(
        PROVIDERS,
        None,
        "Address of an Ollama server; `host:port` works too. Unset: no provider `ollama` of its own accord.",
        wrong="ftp://ollama",
        allowed=f"{_URL}, or host[:port]",
    )
    openai_base_url: HttpUrl | None = setting(
        PROVIDERS,
        None,
        "Base URL of an OpenAI-compatible server, usually ending in `/v1`. Unset: `https://api.openai.com/v1` as soon "
        "as OPENAI_API_KEY is set, else no provider `openai` of its own accord.",
        wrong="api.example.com/v1",
        allowed=_URL,
    )
    openai_api_key: SecretStr | None = setting(
        PROVIDERS,
        None,
        "Key for OPENAI_BASE_URL.",
        wrong="two words",
        allowed="printable characters without spaces",
        secret=True,
    )
    database_url: DatabaseUrl = setting(
        STORE,
        SecretUrl("sqlite+aiosqlite:///data/rotunda.db"),
        "Where conversations, streams and settings of the fleet are kept. SQLite serves one node; several nodes need "
        "PostgreSQL.",
        wrong="mysql://rotunda:hunter2hunter2@db/rotunda",
        allowed=_DATABASE,
    )
    database_auto_migrate: bool = setting(
        STORE,
        False,
        "Whether a gateway brings a PostgreSQL schema up to date when it starts. SQLite always is.",
        wrong="maybe",
    )
    model_rotation_enabled: bool = setting(
        ROTATION,
        True,
        "Whether idle models leave memory for others. Off: a model that does not fit is refused.",
        wrong="sometimes",
    )
    max_concurrent_models: int = setting(
        ROTATION,
        0,
        "Most models of all providers that hold memory at once; 0 = only bytes decide.",
        wrong="many",
        low=0,
        high=10_000,
    )
    rotation_timeout_ms: int = setting(
        ROTATION,
        120_000,
        "How long a request waits for its model before busy models must make room for it; it ends when another load "
        "would have been over by then.",
        unit="ms",
        wrong="0",
        low=100,
        high=DAY_MS,
    )
    rotation_retry_attempts: int = setting(
        ROTATION, 3, "How often a failed load is tried again when it may heal by itself.", wrong="2.5", low=0, high=20
    )
    rotation_retry_delay_ms: int = setting(
        ROTATION,
        1_000,
        "First delay before such a try; it doubles each time.",
        unit="ms",
        wrong="-5",
        low=1,
        high=600_000,
    )
    max_queue_size: int = setting(
        ROTATION,
        256,
        "Most requests that wait for a model; one more is answered 429.",
        wrong="lots",
        low=1,
        high=100_000,
    )
    memory_warning_threshold: float = setting(
        ROTATION, 0.80, "Fraction of the memory in use from which warnings are logged.", wrong="80", low=0, high=1
    )
    memory_cleanup_threshold: float = setting(
        ROTATION,
        0.90,
        "Fraction of the memory in use from which idle models are unloaded.",
        wrong="1.5",
        low=0,
        high=1,
    )
    memory_critical_threshold: float = setting(
        ROTATION, 0.95, "Fraction of the memory in use from which no load starts.", wrong="95%", low=0, high=1
    )
    circuit_breaker_threshold: int = setting(
        ROTATION, 5, "Failures in a row that close the way to a model or provider.", wrong="0", low=1, high=1_000
    )
    circuit_breaker_timeout_ms: int = setting(
        ROTATION, 30_000, "How long that way stays closed before one try.", unit="ms", wrong="half", low=1, high=DAY_MS
    )
    stream_session_timeout_ms: int = setting(
        STREAMS,
        1_800_000,
        "Longest life of one stream, waiting included; then it ends with what there is.",
        unit="ms",
        wrong="30m",
        low=1_000,
        high=DAY_MS,
    )
    max_stream_sessions: int = setting(
        STREAMS,
        1_000,
        "Most streams that one ingress replica runs at once; one more is answered 429.",
        wrong="0",
        low=1,
        high=100_000,
    )
    detach_grace_ms: int = setting(
        STREAMS,
        60_000,
        "How long a stream goes on without a reader before it is terminated; the partial reply is kept.",
        unit="ms",
        wrong="-1",
        low=0,
        high=DAY_MS,
    )
    heartbeat_ms: int = setting(
        STREAMS,
        15_000,
        "A comment is sent after so much silence on a stream.",
        unit="ms",
        wrong="10",
        low=100,
        high=600_000,
    )
    stream_tick_ms: int = setting(
        STREAMS, 100, "How often stream events are written to the store.", unit="ms", wrong="1", low=10, high=10_000
    )
    max_history_messages: int = setting(
        STREAMS, 200, "Most earlier messages that are given to a model.", wrong="none", low=1, high=100_000
    )
    max_message_chars: int = setting(
        STREAMS, 100_000, "Longest message.", unit="characters", wrong="0", low=1, high=10_000_000
    )
    image_max_size_mb: float = setting(
        IMAGES, 10, "Largest image file.", unit="MB (1,000,000 bytes)", wrong="0", low=0.001, high=1_000
    )
    image_max_pixels: int = setting(
        IMAGES, 50_000_000, "Most pixels of an image.", unit="pixels", wrong="4k", low=1, high=1_000_000_000
    )
    max_images_per_message: int = setting(IMAGES, 8, "Most images with one message.", wrong="-1", low=0, high=100)
    image_retention_days: int = setting(
        IMAGES,
        30,
        "Images are deleted when they are so old; 0 = with their conversation.",
        unit="days",
        wrong="a month",
        low=0,
        high=36_500,
    )
    image_allowed_types: MediaTypes = setting(
        IMAGES,
        ("image/png", "image/jpeg", "image/webp", "image/gif"),
        "Image types that are taken.",
        wrong="png,svg",
        allowed="a comma-separated selection of png, jpeg, webp, gif (or image/png, ...)",
    )
    image_storage_path: Path = setting(
        IMAGES,
        Path("data/images"),
        "Folder of the uploaded images; all ingress replicas must see it.",
        wrong="a\0b",
        allowed="a folder",
    )
    api_keys: Keys = setting(
        ACCESS,
        (),
        "Keys that callers must present as `Authorization: Bearer`. Unset: every caller is let in.",
        wrong="tooshort",
        allowed="a comma-separated list of keys of at least 16 characters each",
        secret=True,
    )
    allow_anonymous: bool = setting(
        ACCESS, False, "Whether to serve other machines without any API_KEYS.", wrong="yes please"
    )
    allowed_hosts: Hosts = setting(
        ACCESS,
        ("localhost", "127.0.0.1"),
        "Names under which this server may be called (the `Host` header); others are answered 403.",
        wrong="http://localhost:8000",
        allowed="a comma-separated list of host names, without scheme and port; *.example.com and * work",
    )
    cors_origins: Origins = setting(
        ACCESS,
        (),
        "Other web sites whose pages may call this server.",
        wrong="*",
        allowed="a comma-separated list of origins such as https://app.example.com",
    )
    trust_traceparent: bool = setting(
        TRACES, False, "Whether a caller's trace context is continued (else it is linked).", wrong="2"
    )
    trace_retention_hours: float = setting(
        TRACES,
        72,
        "Traces are deleted when they are so old. Only where no OTEL_EXPORTER_OTLP_ENDPOINT takes them.",
        unit="hours",
        wrong="0",
        low=0.01,
        high=8_760,
    )
    trace_max_spans: int = setting(
        TRACES,
        200_000,
        "Most spans that are kept (about 1 kB each); beyond them the oldest traces are deleted.",
        unit="spans",
        wrong="all",
        low=1_000,
        high=100_000_000,
    )
    rotunda_home: Path = setting(
        CLUSTER,
        Path("."),
        "Folder that relative paths start from. Default: the working directory (of Ray's processes: where Ray was "
        "started). Read from the environment only.",
        wrong="a\0b",
        allowed="a folder that exists",
    )
    ray_dashboard_address: HttpUrl = setting(
        CLUSTER,
        SecretUrl("http://127.0.0.1:8265"),
        "Ray's dashboard; the router asks Serve's REST API there which models are declared.",
        wrong="127.0.0.1:8265",
        allowed=_URL,
    )

    @field_validator("default_model", "openai_api_key", mode="after")
    @classmethod
    def _one_word(cls, value: str | SecretStr | None, info: ValidationInfo) -> str | SecretStr | None:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value or ""
        if not text.isprintable() or " " in text:
            raise ValueError("it holds a space or a control character")
        return value

    @field_validator("hf_model_path", "image_storage_path", "rotunda_home", mode="after")
    @classmethod
    def _a_path(cls, value: Path) -> Path:
        if "\0" in str(value):
            raise ValueError("a path cannot hold a NUL character")
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError("the user after ~ is unknown") from None

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        problems = inconsistencies({name: getattr(self, name) for name in type(self).model_fields})
        if problems:
            raise ValueError("; ".join(problems))
        return self


def inconsistencies(values: Mapping[str, Any]) -> list[str]:
    """What is wrong between values that are each valid; absent ones are not judged."""
    names = ("memory_warning_threshold", "memory_cleanup_threshold", "memory_critical_threshold")
    thresholds = [values[name] for name in names if name in values]
    if len(thresholds) < len(names) or thresholds[0] < thresholds[1] < thresholds[2]:
        return []
    chain = " < ".join(f"{name.upper()} ({value:g})" for name, value in zip(names, thresholds, strict=True))
    return [f"The memory thresholds must rise; they read: {chain}"]
