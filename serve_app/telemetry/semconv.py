"""The names of OpenTelemetry's conventions that spans and metrics carry, as they stand today.

GenAI: https://github.com/open-telemetry/semantic-conventions-genai (docs/gen-ai/gen-ai-spans.md, gen-ai-metrics.md;
status "Development"). The constants of the package ``opentelemetry-semantic-conventions`` are deprecated in its favour.
General ones: https://github.com/open-telemetry/semantic-conventions v1.41. Names of our own begin with ``rotunda.``.
"""

from __future__ import annotations

# GenAI: attributes of the spans `chat {model}` and `embeddings {model}`.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
CONVERSATION = "gen_ai.conversation.id"
OUTPUT_TYPE = "gen_ai.output.type"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_SEED = "gen_ai.request.seed"
REQUEST_FREQUENCY_PENALTY = "gen_ai.request.frequency_penalty"
REQUEST_PRESENCE_PENALTY = "gen_ai.request.presence_penalty"
REQUEST_ENCODING_FORMATS = "gen_ai.request.encoding_formats"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_MODEL = "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
DIMENSIONS = "gen_ai.embeddings.dimension.count"
# Opt-in: what was said.
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"

CHAT, TEXT_COMPLETION, EMBEDDINGS = "chat", "text_completion", "embeddings"
"""Values of :data:`OPERATION`."""

CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
CAPTURE_IN_SPANS = frozenset({"true", "span_only", "span_and_event"})
"""Values of :data:`CAPTURE_CONTENT` (in any case) that ask for content in spans."""

# GenAI: metrics, and the bucket boundaries that the convention gives them, in seconds.
REQUEST_DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"
DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

# General.
ERROR_TYPE = "error.type"
EXCEPTION_TYPE = "exception.type"
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"
URL_PATH = "url.path"
SERVICE_NAME = "service.name"
SERVICE_INSTANCE = "service.instance.id"
HOST_NAME = "host.name"

# Ours.
ROLE = "rotunda.role"
"""Resource: ingress, router, model or upstream."""
MODEL = "rotunda.model"
SESSION = "rotunda.session.id"
SESSION_STATUS = "rotunda.session.status"
TERMINATION_REASON = "rotunda.termination.reason"
CANCELLED = "rotunda.cancelled"
"""The work was given up because nobody wanted it any more: a client left, a person or a limit ended it."""
LINK = "rotunda.link"
"""On a link: what the other span is (``retried``, ``load``, ``session``, ``caller``)."""
QUEUED_MS, LOAD_MS, DECODE_MS = "rotunda.queued_ms", "rotunda.load_ms", "rotunda.decode_ms"
REASON = "rotunda.reason"
POSITION = "rotunda.queue.position"
EVICTING = "rotunda.evicting"
CANDIDATES = "rotunda.candidates"
ATTEMPT = "rotunda.attempt"
ENGINE = "rotunda.engine"
