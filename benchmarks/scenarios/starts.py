"""What replicas that come and go leave behind in Ray Serve itself, without anything of Rotunda's.

``python -m benchmarks.scenarios.starts``: deployments that do nothing scale from zero when they are asked and back to
zero, again and again. Reported per start of a replica: the memory that Serve's controller, Ray's store of the cluster's
state and the calling process keep, and how many actor classes the calling process keeps: ``FunctionActorManager``
forgets none, and ``DeploymentState.autoscale`` copies what it knows of a deployment without its class, so that the next
replica gets a new one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview

from benchmarks.machine import tree, use_of
from benchmarks.protocol import Contender, Result, measure, parser, rounds_of

PATIENCE_S = 60.0
KEEPERS = {"ray::ServeController": "Serve's controller", "gcs_server": "Ray's store of the cluster's state (GCS)"}
HERE = "the process that calls the deployments"
CLASSES = "actor classes"


class Nothing:
    """Does nothing."""

    def __call__(self) -> int:
        return 1


def deployments(count: int) -> list[DeploymentHandle[Any]]:
    """So many deployments without a replica, which get one for a call and lose it soon after."""
    at_once = {"upscale_delay_s": 0, "downscale_delay_s": 0, "downscale_to_zero_delay_s": 0}
    scaled = {"min_replicas": 0, "max_replicas": 1, "metrics_interval_s": 0.2, "look_back_period_s": 0.4, **at_once}
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0}, autoscaling_config=scaled)(Nothing)
    targets = [serve.RunTarget(deployment.bind(), name=f"app-{number}", route_prefix=None) for number in range(count)]
    return list(serve.run_many(targets))


def start_and_end(handles: Sequence[DeploymentHandle[Any]]) -> None:
    """Ask each deployment at once, and wait until none has a replica any more."""
    for answer in [handle.remote() for handle in handles]:
        assert answer.result(timeout_s=PATIENCE_S) == 1
    deadline = time.monotonic() + PATIENCE_S
    while any(_replicas(application) for application in serve.status().applications.values()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"replicas were still there {PATIENCE_S:g} s after they had answered")
        time.sleep(0.1)


def _replicas(application: ApplicationStatusOverview) -> int:
    return sum(sum(deployment.replica_states.values()) for deployment in application.deployments.values())


def kept() -> dict[str, float]:
    """Resident KiB of each process that lasts, and the actor classes of this one."""
    uses = use_of(tree(os.getpid()))
    found = {
        said: sum(use.rss for use in uses.values() if use.name.startswith(title)) / 2**10
        for title, said in KEEPERS.items()
    }
    manager = ray._private.worker.global_worker.function_actor_manager
    return {**found, HERE: uses[os.getpid()].rss / 2**10, CLASSES: float(len(manager._loaded_actor_classes))}


def main() -> None:
    given = parser(__doc__, rounds=5).parse_args()
    at_once, times = (2, 1) if given.quick else (8, 3)
    starts = at_once * times
    result = Result.begin("starts", "What plain Serve keeps of replicas that are gone", given)
    result.settings |= {"starts_per_round": starts, "at_once": at_once}
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        handles = deployments(at_once)

        def one_round(seed: int) -> dict[str, float]:
            before = kept()
            for _ in range(times):
                start_and_end(handles)
            after = kept()
            return {what: (after[what] - before[what]) / starts for what in after}

        plain = Contender("plain Serve", one_round, lambda: tree(os.getpid()), changing=True)
        found = measure([plain], rounds_of(given), given.seed, "starts:", warm_up=True)
    finally:
        serve.shutdown()
        ray.shutdown()
    for what in (*KEEPERS.values(), HERE):
        result.add(found, found.value(f"memory kept per start: {what}", "plain Serve", what, "KiB"))
    said = "actor classes kept per start in the process that calls"
    result.add(found, found.value(said, "plain Serve", CLASSES, "classes"))
    result.details["rounds"] = found.rounds
    result.write()


if __name__ == "__main__":
    main()
