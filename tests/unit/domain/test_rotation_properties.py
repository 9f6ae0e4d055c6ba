"""Whatever happens in whatever order: the promises that rotation never breaks."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from serve_app.domain.eviction import POLICIES
from serve_app.domain.generation import Priority
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_events import (
    EmergencyCleanup,
    LeaseRenewed,
    Limits,
    MemoryMeasured,
    Pin,
    ScaleOut,
    Unload,
)
from tests.unit.domain.rotation_world import GIB, World, model

NAMES = ("A", "B", "C", "D", "E")
SIZES = (1, 1, 1.5, 2, 3)


class Life(RuleBasedStateMachine):
    """Anything that users, operators, replicas and ingresses may do, in any order."""

    world: World

    @initialize(
        sizes=st.lists(st.sampled_from((2, 3, 4)), min_size=1, max_size=2),
        enabled=st.sampled_from((True, True, True, False)),
        queue=st.sampled_from((3, 50)),
        parallel=st.sampled_from((0, 1)),
        cap=st.sampled_from((0, 0, 2)),
        policy=st.sampled_from(sorted(POLICIES)),
        residency=st.sampled_from((0.0, 5.0)),
    )
    def begin(
        self, sizes: list[float], enabled: bool, queue: int, parallel: int, cap: int, policy: str, residency: float
    ) -> None:
        limits = Limits(
            enabled=enabled,
            max_queue=queue,
            max_wait_s=20,
            load_timeout_s=40,
            max_parallel_loads=parallel,
            max_local_models=cap,
            min_residency_s=residency,
            barrier_s=0,
            silence_s=None,
            settle_s=0.5,
        )
        models = [model(name, gib, reload_s=1 + gib) for name, gib in zip(NAMES, SIZES, strict=True)]
        self.policy, self.limits = POLICIES[policy], limits
        self.world = World(models, sizes, limits, self.policy, prompt=False)
        self.tickets = 0

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=2),
        priority=st.sampled_from(Priority),
        caller=st.sampled_from("xy"),
        holder=st.sampled_from(("i1", "i2")),
    )
    def request(self, names: list[str], priority: Priority, caller: str, holder: str) -> None:
        self.tickets += 1
        resident = [one for one in names[:1] if self.world.rotation.granted(one) and self._ready(one)]
        self.world.ask(f"t{self.tickets}", *names, priority=priority, caller=caller, holder=holder)
        if resident:
            assert self.world.granted(f"t{self.tickets}"), "a load blocked a request for a model in memory"

    @precondition(lambda self: self.world.waiting())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.waiting()))))

    @precondition(lambda self: self.world.unclaimed)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        """However late: the lease must hold for as long as the ingress believes."""
        self.world.claim(data.draw(st.sampled_from(sorted(self.world.unclaimed))))

    @rule(seconds=st.sampled_from((0.1, 0.6, 3.0, 15.0)))
    def time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: self._loading())
    @rule(data=st.data(), ends=st.sampled_from(("well", "well", "badly", "for good")))
    def load_ends(self, data: st.DataObject, ends: str) -> None:
        name = data.draw(st.sampled_from(self._loading()))
        if ends == "well":
            self.world.loaded(name)
        else:
            self.world.fails(name, retryable=ends == "badly")

    @precondition(lambda self: self.world.revoked)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        self.world.acknowledge_one(data.draw(st.integers(0, len(self.world.revoked) - 1)))

    @precondition(lambda self: self._callable())
    @rule(data=st.data())
    def call_under_lease(self, data: st.DataObject) -> None:
        holder, name = data.draw(st.sampled_from(self._callable()))
        self.world.use(holder, name)

    @precondition(lambda self: self.world.leases)
    @rule(data=st.data())
    def renew_unused(self, data: st.DataObject) -> None:
        holder, name = data.draw(st.sampled_from(sorted(self.world.leases)))
        self.world.tell(LeaseRenewed(holder, name, uses=0))

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def request_ends(self, data: st.DataObject) -> None:
        self.world.finish(data.draw(st.sampled_from(self._running())))

    @precondition(lambda self: self._quiet_retired())
    @rule(data=st.data())
    def process_ends(self, data: st.DataObject) -> None:
        self.world.ends(data.draw(st.sampled_from(self._quiet_retired())))

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self.world.tell(Pin(name, pinned))

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        self.world.tell(Unload(name))

    @rule(name=st.sampled_from(NAMES))
    def ask_for_one_replica(self, name: str) -> None:
        self.world.tell(ScaleOut(name, 1))

    @rule()
    def clean_up(self) -> None:
        self.world.tell(EmergencyCleanup())

    @rule(used=st.sampled_from((0.3, 0.82, 0.92, 0.97)))
    def memory(self, used: float) -> None:
        self.world.tell(MemoryMeasured("n0", used * 10 * GIB, 10 * GIB))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self._everyone_is_answered()
        self._the_same_again()

    def _everyone_is_answered(self) -> None:
        """Fair conditions: loads and requests end, ingresses acknowledge, time passes."""
        world = self.world
        for _ in range(80):
            world.settle()
            world.use_up()
            for ticket in list(world.unclaimed):
                world.claim(ticket)
            if not world.waiting():
                break
            world.pass_time(1.0)
        assert not world.waiting(), world.rotation
        state = world.rotation.state
        assert not state.line.tickets and not state.line.groups
        world.settle()
        assert not state.residency.pending

    def _the_same_again(self) -> None:
        """The same events at the same times have the same effects."""
        again = Rotation(0.0, self.limits, self.policy)
        effects = [effect for event, at in self.world.events for effect in again.handle(event, at)]
        assert repr(effects) == repr(self.world.effects)
        assert repr(again) == repr(self.world.rotation)

    def _ready(self, name: str) -> bool:
        replica = self.world.replicas.get(name)
        resident = self.world.rotation.state.residency.residents.get(name)
        return replica is not None and replica.loaded and resident is not None and resident.ready

    def _loading(self) -> list[str]:
        found = self.world.replicas.items()
        return sorted(name for name, replica in found if not replica.loaded and not replica.retired)

    def _running(self) -> list[str]:
        return sorted(name for name, replica in self.world.replicas.items() if replica.running)

    def _quiet_retired(self) -> list[str]:
        return sorted(name for name, replica in self.world.replicas.items() if replica.retired and not replica.running)

    def _callable(self) -> list[tuple[str, str]]:
        return sorted(pair for pair in self.world.leases if self.world.may_call(*pair))


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
