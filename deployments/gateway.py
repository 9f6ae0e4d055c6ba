"""The gateway application: ingress and router. What ``serve_config.yaml`` imports."""

from ray import serve
from ray.serve import Application

from deployments.ingress import Ingress
from deployments.router import Router
from serve_app.config import GatewayArgs


def build(args: GatewayArgs) -> Application:
    """The gateway from its arguments; ``ingress`` scales between its bounds, ``router`` is one replica."""
    return assembled(args, Ingress)


def assembled(args: GatewayArgs, of: type) -> Application:
    """The gateway with this class as its ingress."""
    router = serve.deployment(
        Router,
        name="router",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        health_check_period_s=2,
    )
    ingress = serve.deployment(
        of,
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=5_000,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=15,
        graceful_shutdown_wait_loop_s=0.1,
        autoscaling_config={
            "min_replicas": args.ingress_min_replicas,
            "max_replicas": args.ingress_max_replicas,
            "target_ongoing_requests": 500,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 5.0,
        },
    )
    return ingress.bind(args, router.bind(args))
