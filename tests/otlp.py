"""A real OTLP receiver (http/protobuf) for tests: what an exporter sends, it keeps."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from serve_app.telemetry.spans import SpanRow
from tests.spans import Trace


class Receiver:
    """Listens on a free port of this machine until :meth:`close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, list[SpanRow]] = {}
        self.bytes = b""
        """All that came, as it came."""
        self.refused: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def trace(self, id: str) -> Trace:
        with self._lock:
            return Trace(self._rows.get(id, ()))

    def ids(self) -> set[str]:
        with self._lock:
            return set(self._rows)

    def _take(self, path: str, body: bytes) -> int:
        with self._lock:
            self.bytes += body
            if path != "/v1/traces":
                self.refused.append(path)
                return 404
            request = ExportTraceServiceRequest()
            try:
                request.ParseFromString(body)
            except DecodeError as error:
                self.refused.append(str(error))
                return 400
            for row in _rows(request):
                self._rows.setdefault(row.trace_id, []).append(row)
            return 200

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                self.send_response(receiver._take(self.path, body))
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _rows(request: ExportTraceServiceRequest) -> list[SpanRow]:
    import json

    rows = []
    for each in request.resource_spans:
        resource = _attributes(each.resource.attributes)
        for span in (span for scope in each.scope_spans for span in scope.spans):
            body = {
                "attributes": _attributes(span.attributes),
                "links": [
                    {
                        "traceId": link.trace_id.hex(),
                        "spanId": link.span_id.hex(),
                        "attributes": _attributes(link.attributes),
                    }
                    for link in span.links
                ],
                "events": [
                    {"name": event.name, "at": event.time_unix_nano, "attributes": _attributes(event.attributes)}
                    for event in span.events
                ],
                "message": span.status.message,
                "resource": resource,
            }
            # Bit 9: whether the parent came from outside; with bit 8 it says that this is known.
            from_outside = bool(span.flags & 0x100 and span.flags & 0x200)
            rows.append(
                SpanRow(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.name,
                    span.kind,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code,
                    not span.parent_span_id or from_outside,
                    json.dumps(body),
                )
            )
    return rows


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(given: AnyValue) -> Any:
        kind = given.WhichOneof("value")
        return [value(part) for part in given.array_value.values] if kind == "array_value" else getattr(given, kind)

    return {pair.key: value(pair.value) for pair in pairs if isinstance(pair, KeyValue)}
