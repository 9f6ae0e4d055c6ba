"""Models, providers and what can be done with them, as GraphQL types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import strawberry

from serve_app.api.graphql.types import moment_or_none
from serve_app.domain.fleet import FleetView, ModelStatus, ProviderStatus
from serve_app.domain.placement import Resources, limited

# Bytes outgrow GraphQL's 32-bit Int; a Float counts them exactly up to 2**53.


@strawberry.type
class Model:
    name: str = strawberry.field(description="The shortest name that means this model and no other.")
    id: strawberry.ID
    provider: str
    task: str | None
    capabilities: list[str]
    state: str = strawberry.field(description="cold, queued, loading, ready, busy, retiring, failed or unavailable.")
    pinned: bool
    declared: bool = strawberry.field(description="Whether it stands in serve_config.yaml; others were discovered.")
    size_bytes: float | None = strawberry.field(description="Of the weights on disk.")
    memory_bytes: float | None = strawberry.field(description="In use by its replicas; null when it is not loaded.")
    context_length: int | None
    quantization: str | None
    loaded_at: str | None
    last_used_at: str | None
    request_count: int
    error_count: int
    average_response_ms: float | None
    replicas: int
    reason: str | None = strawberry.field(description="Why it is in this state, when there is something to say.")

    @classmethod
    def of(cls, status: ModelStatus) -> Model:
        values = status.to_json()
        return cls(
            name=values["name"],
            id=strawberry.ID(values["id"]),
            provider=values["provider"],
            task=values["task"],
            capabilities=[str(capability) for capability in values["capabilities"]],
            state=values["state"],
            pinned=values["pinned"],
            declared=values["declared"],
            size_bytes=values["sizeBytes"],
            memory_bytes=values["memoryBytes"],
            context_length=values["contextLength"],
            quantization=values["quantization"],
            loaded_at=moment_or_none(values["loadedAt"]),
            last_used_at=moment_or_none(values["lastUsedAt"]),
            request_count=values["requestCount"],
            error_count=values["errorCount"],
            average_response_ms=values["averageResponseMs"],
            replicas=values["replicas"],
            reason=values["reason"],
        )


@strawberry.type(description="How the discovery of one provider's models went.")
class Provider:
    name: str
    kind: str
    status: str = strawberry.field(description='Either "ok" or "error".')
    error: str | None
    model_count: int

    @classmethod
    def of(cls, status: ProviderStatus) -> Provider:
        return cls(
            name=status.name,
            kind=status.kind,
            status=status.status,
            error=status.error,
            model_count=status.model_count,
        )


@strawberry.type
class AvailableModelsResponse:
    models: list[str]
    count: int
    items: list[Model]
    providers: list[Provider] = strawberry.field(
        description="A provider that failed stands here with its error, and takes nothing from the others."
    )

    @classmethod
    def of(cls, view: FleetView) -> AvailableModelsResponse:
        return cls(
            models=[status.name for status in view.models],
            count=len(view.models),
            items=[Model.of(status) for status in view.models],
            providers=[Provider.of(status) for status in view.providers],
        )


@strawberry.type(description="A model after a command; loading and unloading go on after the answer.")
class ModelChange:
    model: str
    state: str
    reason: str | None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> ModelChange:
        return cls(model=str(answer["model"]), state=str(answer["state"]), reason=answer.get("reason"))


def bytes_of(amount: Resources) -> float | None:
    """Memory in bytes; None where nothing limits it."""
    return None if math.isinf(amount.memory) else float(amount.memory)


@strawberry.type
class ResourceAmount:
    cpu: float | None = strawberry.field(description="Null where nothing limits it.")
    gpu: float | None = strawberry.field(description="Null where nothing limits it.")
    memory_bytes: float | None = strawberry.field(description="Null where nothing limits it.")

    @classmethod
    def of(cls, amount: Resources) -> ResourceAmount:
        return cls(cpu=limited(amount.cpu), gpu=limited(amount.gpu), memory_bytes=bytes_of(amount))

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> ResourceAmount | None:
        """What :meth:`Resources.to_json` gave; None for nothing."""
        return cls(cpu=values["cpu"], gpu=values["gpu"], memory_bytes=values["memoryBytes"]) if values else None


@strawberry.type
class PlanPart:
    name: str
    bytes: float


@strawberry.type(description="How a model would come into memory if somebody asked for it now.")
class Plan:
    model: str
    verdict: str = strawberry.field(description="resident, loading, fits, evicts, waits, never_fits or refused.")
    node: str | None = strawberry.field(description="Where it is or would be.")
    evicts: list[str] = strawberry.field(description="The models that would leave.")
    parts: list[PlanPart] = strawberry.field(description="The memory that it needs, part by part.")
    demand: ResourceAmount | None = strawberry.field(description="Of one replica, all parts together.")
    capacity: ResourceAmount | None = strawberry.field(description="Of the node.")
    free: ResourceAmount | None = strawberry.field(description="On the node, before anything leaves.")
    freed: ResourceAmount | None = strawberry.field(description="What the models that leave give back there.")
    eta_ms: float | None
    reason: str | None
    error: str | None = strawberry.field(description="The code that a request would end with.")

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Plan:
        parts: Mapping[str, float] = answer.get("bytes") or {}
        return cls(
            model=str(answer["model"]),
            verdict=str(answer["verdict"]),
            node=answer.get("node"),
            evicts=[str(name) for name in answer.get("evicts") or ()],
            parts=[PlanPart(name=name, bytes=size) for name, size in parts.items()],
            demand=ResourceAmount.from_json(answer.get("demand")),
            capacity=ResourceAmount.from_json(answer.get("capacity")),
            free=ResourceAmount.from_json(answer.get("free")),
            freed=ResourceAmount.from_json(answer.get("freed")),
            eta_ms=answer.get("etaMs"),
            reason=answer.get("reason"),
            error=answer.get("error"),
        )
