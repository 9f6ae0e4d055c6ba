"""The tables at the newest revision. Queries use them; the migrations in ``migrations/`` build them.

Portable between SQLite and PostgreSQL: every point in time is UTC, and text is made storable on the way in.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    false,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

# What PostgreSQL (NUL) or UTF-8 (lone surrogates, which JSON's \ud800 smuggles in) cannot hold.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

_Text = TypeVar("_Text", str, str | None)

ACTIVE = "ACTIVE"
_WHERE_ACTIVE = text("status = 'ACTIVE'")
_WHERE_LOGGED = text("has_log")


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware UTC datetime. SQLite keeps ``YYYY-MM-DD HH:MM:SS.ffffff``, which sorts as text."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("The store takes timezone-aware datetimes only.")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class CleanText(TypeDecorator[str]):
    """Text of any length; characters that no database can hold become U+FFFD instead of a failure."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return clean(value)


def clean(text: _Text) -> _Text:
    """``text`` as it is kept."""
    return text if text is None or (text.isascii() and "\x00" not in text) else _UNSTORABLE.sub("\ufffd", text)


class database_ms(FunctionElement[int]):
    """Milliseconds since 1970 by the database's clock, so that several hosts agree on what has expired."""

    type = BigInteger()
    inherit_cache = True
    name = "database_ms"


@compiles(database_ms, "sqlite")
def _sqlite_ms(element: database_ms, compiler: SQLCompiler, **kwargs: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


@compiles(database_ms, "postgresql")
def _postgresql_ms(element: database_ms, compiler: SQLCompiler, **kwargs: Any) -> str:
    # Not now(): that stands still for the length of a transaction, waiting for row locks included.
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"


metadata = MetaData()


def _parent(table: str, **options: Any) -> Column[Any]:
    reference = ForeignKey(f"{table}s.id", ondelete="CASCADE")
    return Column(f"{table}_id", CleanText, reference, **options)


conversations = Table(
    "conversations",
    metadata,
    Column("id", CleanText, primary_key=True),
    Column("tab_name", CleanText, nullable=False),
    Column("llm_model", CleanText),
    Column("is_private", Boolean, nullable=False),
    Column("password_hash", CleanText),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("system_prompt", CleanText),
    Index("ix_conversations_updated", "updated_at", "id"),
    Index("ix_conversations_private_updated", "is_private", "updated_at", "id"),
)

messages = Table(
    "messages",
    metadata,
    Column("id", CleanText, primary_key=True),
    _parent("conversation", nullable=False),
    Column("text", CleanText, nullable=False),
    Column("sender", CleanText, nullable=False),
    Column("timestamp", UtcDateTime, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("has_images", Boolean, nullable=False),
    # Order within the conversation: clocks of several hosts, and their resolution, cannot give it.
    Column("seq", BigInteger, nullable=False),
    Column("status", CleanText, nullable=False),
    Column("model", CleanText),
    Column("provider", CleanText),
    Index("uq_messages_conversation_seq", "conversation_id", "seq", unique=True),
)

images = Table(
    "images",
    metadata,
    Column("id", CleanText, primary_key=True),
    _parent("conversation", nullable=False),
    _parent("message"),
    Column("filename", CleanText, nullable=False),
    Column("file_path", CleanText, nullable=False),
    Column("file_size", BigInteger, nullable=False),
    Column("mime_type", CleanText, nullable=False),
    Column("content_hash", CleanText, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("deleted_at", UtcDateTime),
    Index("ix_images_conversation", "conversation_id"),
    Index("ix_images_message", "message_id"),
    Index("ix_images_file_path", "file_path"),
    Index("ix_images_expires", "expires_at"),
)

stream_sessions = Table(
    "stream_sessions",
    metadata,
    Column("id", CleanText, primary_key=True),
    _parent("conversation", nullable=False),
    Column("model", CleanText, nullable=False),
    Column("status", CleanText, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("partial_response", CleanText, nullable=False),
    Column("token_count", Integer, nullable=False),
    Column("termination_reason", CleanText),
    Column("error_message", CleanText),
    Column("timeout_ms", Integer),
    Column("created_at", UtcDateTime, nullable=False),
    Column("provider", CleanText, nullable=False),
    Column("owner", CleanText),
    Column("owned_until_ms", BigInteger),
    Column("trace_id", CleanText),
    Column("error_code", CleanText),
    Column("message_id", CleanText),
    Column("finish_reason", CleanText),
    Column("terminate_requested_at", UtcDateTime),
    Column("terminate_reason", CleanText),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("queued_s", Float),
    Column("load_s", Float),
    Column("ttft_s", Float),
    Column("decode_s", Float),
    Column("total_s", Float),
    # Counts the owners: what an earlier one still writes is refused.
    Column("epoch", Integer, nullable=False, server_default=text("1")),
    # How the reply is wanted (serve_app.domain.wanted), for whoever adopts the session.
    Column("wanted", CleanText),
    # The message that the reply answers.
    Column("question_id", CleanText),
    Column("idempotency_key", CleanText),
    Column("fingerprint", CleanText),
    Column("provider_stopped", Boolean),
    # Whether stream_events holds its events; they go some time after its end.
    Column("has_log", Boolean, nullable=False, server_default=false()),
    Index("ix_stream_sessions_started", "started_at", "id"),
    Index("ix_stream_sessions_conversation_started", "conversation_id", "started_at", "id"),
    Index("ix_stream_sessions_status_started", "status", "started_at", "id"),
    Index("ix_stream_sessions_message", "message_id"),
    Index("ix_stream_sessions_active_owner", "owner", sqlite_where=_WHERE_ACTIVE, postgresql_where=_WHERE_ACTIVE),
    Index(
        "ix_stream_sessions_active_expiry", "owned_until_ms", sqlite_where=_WHERE_ACTIVE, postgresql_where=_WHERE_ACTIVE
    ),
    Index(
        "uq_stream_sessions_active_conversation",
        "conversation_id",
        unique=True,
        sqlite_where=_WHERE_ACTIVE,
        postgresql_where=_WHERE_ACTIVE,
    ),
    # Empty values are all different to both databases.
    Index("uq_stream_sessions_idempotency_key", "idempotency_key", unique=True),
    Index("ix_stream_sessions_logged", "ended_at", sqlite_where=_WHERE_LOGGED, postgresql_where=_WHERE_LOGGED),
)

# The log of the streams: see serve_app.domain.stream_log. Its order on the disk is that of its key.
stream_events = Table(
    "stream_events",
    metadata,
    Column("session_id", Text, ForeignKey("stream_sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("seq_to", Integer, nullable=False),
    Column("text_offset", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("text", CleanText, nullable=False),
    # JSON: the lengths of the events' texts, the fields of an event without text, the ids of the text's tokens.
    Column("lengths", Text),
    Column("payload", Text),
    Column("token_ids", Text),
    Column("provider", CleanText, nullable=False),
    Column("model", CleanText, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("revision", Text),
    sqlite_with_rowid=False,
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("name", CleanText, primary_key=True),
    Column("key", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

password_attempts = Table(
    "password_attempts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("conversation_id", CleanText, nullable=False),
    Column("address", CleanText, nullable=False),
    Column("attempted_at", UtcDateTime, nullable=False),
    Index("ix_password_attempts_who", "conversation_id", "address", "attempted_at"),
    Index("ix_password_attempts_when", "attempted_at"),
)

fleet_memory = Table(
    "fleet_memory",
    metadata,
    Column("key", CleanText, primary_key=True),
    Column("value", CleanText, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)
