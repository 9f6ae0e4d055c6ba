"""Where the spans of a process go, as the standard variables say, and who they say made them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.util.types import AttributeValue

from serve_app.telemetry import semconv
from serve_app.telemetry.pipeline import Counted, Outgoing

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def exports_elsewhere(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an endpoint for OTLP is configured; then no span is kept here."""
    return any(environ.get(name) for name in ENDPOINTS)


def otlp(outgoing: Outgoing, environ: Mapping[str, str]) -> SpanProcessor:
    """Exports by OTLP over HTTP as the SDK's own variables say, and tells :class:`Outgoing` what came of it."""
    _check_protocol(environ)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(Counted(OTLPSpanExporter(), outgoing))


def _check_protocol(environ: Mapping[str, str]) -> None:
    wanted = next(filter(None, (environ.get(name, "").strip().lower() for name in PROTOCOLS)), "http/protobuf")
    if wanted != "http/protobuf":
        logger.warning(
            "spans are exported by http/protobuf; %s is not supported. The endpoint must take OTLP over HTTP, "
            "which collectors do at port 4318.",
            wanted,
        )


def resource_of(role: str, instance: str, environ: Mapping[str, str]) -> Resource:
    """Who makes the spans: this process, as the platform and the host know it."""
    own: dict[str, AttributeValue] = {
        semconv.SERVICE_INSTANCE: instance,
        semconv.HOST_NAME: socket.gethostname(),
        semconv.ROLE: role,
    }
    named = environ.get("OTEL_SERVICE_NAME") or semconv.SERVICE_NAME in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return Resource.create(own if named else {semconv.SERVICE_NAME: "rotunda", **own})
