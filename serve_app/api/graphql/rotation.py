"""What the rotation sees and decides, as GraphQL types. Memory is in bytes, as Floats: Int ends at 2 GiB."""

from __future__ import annotations

from typing import Annotated

import strawberry

from serve_app.api.graphql.models import ResourceAmount, bytes_of
from serve_app.api.graphql.paging import MAX_PAGE, page_size
from serve_app.api.graphql.resolvers import field
from serve_app.api.graphql.types import GraphInfo, moment, moment_or_none
from serve_app.domain.placement import limited
from serve_app.domain.rotation_effects import Decision as Decided
from serve_app.domain.rotation_view import HISTORY, FailureView, NodeView, QueueView, ResidentView, RotationView

DecisionLimit = Annotated[int, strawberry.argument(description=f"The last ones, 1 to {MAX_PAGE}.")]


@strawberry.type(description="Processors of one kind on a node.")
class Share:
    total: float | None = strawberry.field(description="Null where nothing limits it; then so is free.")
    used: float
    free: float | None


@strawberry.type(description="A place for models; total, used and free are bytes of memory.")
class NodeCapacity:
    node: str
    provider: str
    total: float | None = strawberry.field(description="Null where nothing limits it; then so is free.")
    used: float | None = strawberry.field(description="What models hold there or are promised.")
    free: float | None
    cpu: Share
    gpu: Share
    measured: float | None = strawberry.field(
        description="The fraction of its memory that was last found in use, by whomever; null when nobody measured."
    )
    pressure: str = strawberry.field(description="calm, warning, cleanup or critical.")

    @classmethod
    def of(cls, view: NodeView) -> NodeCapacity:
        total, used, free = view.total, view.used, view.free
        return cls(
            node=view.name,
            provider=view.pool,
            total=bytes_of(total),
            used=bytes_of(used),
            free=bytes_of(free),
            cpu=Share(total=limited(total.cpu), used=used.cpu, free=limited(free.cpu)),
            gpu=Share(total=limited(total.gpu), used=used.gpu, free=limited(free.gpu)),
            measured=view.measured,
            pressure=view.pressure,
        )


@strawberry.type(description="A model that holds memory or is about to.")
class Resident:
    model: str
    state: str
    nodes: list[str] = strawberry.field(description="One entry for each replica.")
    replicas: int
    held: ResourceAmount = strawberry.field(description="Over all replicas.")
    running: int
    pinned: bool
    since: str
    last_used_at: str | None
    holders: list[str] = strawberry.field(description="The servers that may call it without asking.")
    reason: str | None

    @classmethod
    def of(cls, view: ResidentView) -> Resident:
        return cls(
            model=view.model,
            state=view.state.value,
            nodes=list(view.nodes),
            replicas=len(view.nodes),
            held=ResourceAmount.of(view.held),
            running=view.running,
            pinned=view.pinned,
            since=moment(view.since),
            last_used_at=moment_or_none(view.last_used_at),
            holders=list(view.holders),
            reason=view.reason,
        )


@strawberry.type
class WaitingRequest:
    position: int = strawberry.field(description="From 1, over the models that are waited for.")
    model: str
    priority: str = strawberry.field(description="high, normal or low.")
    caller: str
    waiting_ms: float
    reason: str
    eta_ms: float | None
    evicting: list[str]

    @classmethod
    def of(cls, view: QueueView) -> WaitingRequest:
        return cls(
            position=view.position,
            model=view.model,
            priority=view.priority,
            caller=view.caller,
            waiting_ms=view.waiting_ms,
            reason=view.reason,
            eta_ms=view.eta_ms,
            evicting=list(view.evicting),
        )


@strawberry.type(description="Something that was decided, and why.")
class Decision:
    at: str
    action: str
    model: str = strawberry.field(description="Empty when it concerns no single model.")
    victims: list[str]
    reason: str
    duration_ms: float | None = strawberry.field(description="Of the wait or load that it ended.")
    caller: str
    times: int = strawberry.field(description="How often in a row, when the same was decided again.")

    @classmethod
    def of(cls, decision: Decided) -> Decision:
        values = decision.to_json()
        return cls(
            at=moment(decision.at),
            action=decision.action,
            model=decision.model,
            victims=list(decision.victims),
            reason=decision.reason,
            duration_ms=values["durationMs"],
            caller=decision.caller,
            times=decision.times,
        )


@strawberry.type(description="A model whose last load failed.")
class LoadFailure:
    model: str
    code: str
    message: str
    failures: int = strawberry.field(description="In a row.")
    next_try: str | None = strawberry.field(description="Null: not before its files change.")

    @classmethod
    def of(cls, view: FailureView) -> LoadFailure:
        return cls(
            model=view.model,
            code=view.code,
            message=view.message,
            failures=view.failures,
            next_try=moment_or_none(view.next_try),
        )


@strawberry.type(name="Rotation", description="Which models hold memory, who waits for some, and what was decided.")
class RotationState:
    view: strawberry.Private[RotationView]
    enabled: bool = strawberry.field(description="False: no model leaves memory for another.")
    policy: str
    capacity: list[NodeCapacity]
    residents: list[Resident]
    queue: list[WaitingRequest]
    failures: list[LoadFailure]
    removed: list[str] = strawberry.field(description="The models that setRotation took out of the pool.")

    @classmethod
    def of(cls, view: RotationView) -> RotationState:
        return cls(
            view=view,
            enabled=view.enabled,
            policy=view.policy,
            capacity=[NodeCapacity.of(node) for node in view.nodes],
            residents=[Resident.of(resident) for resident in view.residents],
            queue=[WaitingRequest.of(waiting) for waiting in view.queue],
            failures=[LoadFailure.of(failure) for failure in view.failures],
            removed=list(view.removed),
        )

    @field("The last decisions, oldest first.")
    async def history(self, info: GraphInfo, limit: DecisionLimit = HISTORY) -> list[Decision]:
        most = page_size(limit) or HISTORY
        view = self.view if most <= HISTORY else await info.context.services.gateway.router.rotation(most)
        return [Decision.of(decision) for decision in view.history[-most:]]


@strawberry.type
class RotationChange:
    removed: list[str] = strawberry.field(description="All models that may not be used now.")


@strawberry.type
class Cleanup:
    evicting: list[str] = strawberry.field(description="The idle models that leave memory.")
