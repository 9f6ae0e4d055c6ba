"""Rotunda's columns: providers, ownership, usage and timing of a stream; status and order of a message; keys.

A database of the chat service comes here as it was made elsewhere, with looser columns and other spellings of a
point in time. So on SQLite every table is rebuilt in the shape of revision 0001, plus whatever columns it had besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from serve_app.domain.errors import InvalidConfig

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_ACTIVE = sa.text("status = 'ACTIVE'")
# How SQLite keeps a point in time here, as a GLOB pattern.
_CANONICAL = "0000-00-00 00:00:00.000000".replace("0", "[0-9]")
_REQUIRED, _OPTIONAL = False, True

# The columns of revision 0001: name, type, whether it may be empty.
_CHAT_SERVICE: dict[str, tuple[tuple[str, Any, bool], ...]] = {
    "conversations": (
        ("id", sa.Text, _REQUIRED),
        ("tab_name", sa.Text, _REQUIRED),
        ("llm_model", sa.Text, _OPTIONAL),
        ("is_private", sa.Boolean, _REQUIRED),
        ("password_hash", sa.Text, _OPTIONAL),
        ("created_at", _TIME, _REQUIRED),
        ("updated_at", _TIME, _REQUIRED),
    ),
    "messages": (
        ("id", sa.Text, _REQUIRED),
        ("conversation_id", sa.Text, _REQUIRED),
        ("text", sa.Text, _REQUIRED),
        ("sender", sa.Text, _REQUIRED),
        ("timestamp", _TIME, _REQUIRED),
        ("created_at", _TIME, _REQUIRED),
        ("has_images", sa.Boolean, _REQUIRED),
    ),
    "images": (
        ("id", sa.Text, _REQUIRED),
        ("conversation_id", sa.Text, _REQUIRED),
        ("message_id", sa.Text, _OPTIONAL),
        ("filename", sa.Text, _REQUIRED),
        ("file_path", sa.Text, _REQUIRED),
        ("file_size", sa.BigInteger, _REQUIRED),
        ("mime_type", sa.Text, _REQUIRED),
        ("content_hash", sa.Text, _REQUIRED),
        ("created_at", _TIME, _REQUIRED),
        ("expires_at", _TIME, _OPTIONAL),
        ("deleted_at", _TIME, _OPTIONAL),
    ),
    "stream_sessions": (
        ("id", sa.Text, _REQUIRED),
        ("conversation_id", sa.Text, _REQUIRED),
        ("model", sa.Text, _REQUIRED),
        ("status", sa.Text, _REQUIRED),
        ("started_at", _TIME, _REQUIRED),
        ("updated_at", _TIME, _REQUIRED),
        ("ended_at", _TIME, _OPTIONAL),
        ("partial_response", sa.Text, _REQUIRED),
        ("token_count", sa.Integer, _REQUIRED),
        ("termination_reason", sa.Text, _OPTIONAL),
        ("error_message", sa.Text, _OPTIONAL),
        ("timeout_ms", sa.Integer, _OPTIONAL),
        ("created_at", _TIME, _REQUIRED),
    ),
}

# The columns that this revision adds.
_OURS: dict[str, tuple[tuple[str, Any, bool], ...]] = {
    "conversations": (("system_prompt", sa.Text, _OPTIONAL),),
    "messages": (
        ("seq", sa.BigInteger, _REQUIRED),
        ("status", sa.Text, _REQUIRED),
        ("model", sa.Text, _OPTIONAL),
        ("provider", sa.Text, _OPTIONAL),
    ),
    "images": (),
    "stream_sessions": (
        ("provider", sa.Text, _REQUIRED),
        ("owner", sa.Text, _OPTIONAL),
        ("owned_until_ms", sa.BigInteger, _OPTIONAL),
        ("trace_id", sa.Text, _OPTIONAL),
        ("error_code", sa.Text, _OPTIONAL),
        ("message_id", sa.Text, _OPTIONAL),
        ("finish_reason", sa.Text, _OPTIONAL),
        ("terminate_requested_at", _TIME, _OPTIONAL),
        ("terminate_reason", sa.Text, _OPTIONAL),
        ("prompt_tokens", sa.Integer, _OPTIONAL),
        ("completion_tokens", sa.Integer, _OPTIONAL),
        ("cached_tokens", sa.Integer, _OPTIONAL),
        ("queued_s", sa.Float, _OPTIONAL),
        ("load_s", sa.Float, _OPTIONAL),
        ("ttft_s", sa.Float, _OPTIONAL),
        ("decode_s", sa.Float, _OPTIONAL),
        ("total_s", sa.Float, _OPTIONAL),
    ),
}

_PARENTS = {"conversation_id": "conversations.id", "message_id": "messages.id"}

# What a required column holds where the chat service left it empty; in this order.
_FILLINGS = (
    ("conversations", "tab_name", "''"),
    ("conversations", "is_private", "(password_hash IS NOT NULL)"),
    ("conversations", "created_at", "COALESCE(updated_at, CURRENT_TIMESTAMP)"),
    ("conversations", "updated_at", "created_at"),
    ("messages", "text", "''"),
    ("messages", "timestamp", "COALESCE(created_at, CURRENT_TIMESTAMP)"),
    ("messages", "created_at", "timestamp"),
    ("messages", "has_images", "EXISTS (SELECT 1 FROM images WHERE images.message_id = messages.id)"),
    ("messages", "status", "'complete'"),
    ("images", "file_size", "0"),
    ("images", "content_hash", "''"),
    ("images", "created_at", "CURRENT_TIMESTAMP"),
    ("stream_sessions", "started_at", "COALESCE(created_at, updated_at, CURRENT_TIMESTAMP)"),
    ("stream_sessions", "updated_at", "COALESCE(ended_at, started_at)"),
    ("stream_sessions", "created_at", "started_at"),
    ("stream_sessions", "partial_response", "''"),
    ("stream_sessions", "token_count", "0"),
    ("stream_sessions", "provider", "'ollama'"),
)

# name, table, columns, unique, only active sessions
_INDEXES: tuple[tuple[str, str, list[str], bool, bool], ...] = (
    ("ix_conversations_updated", "conversations", ["updated_at", "id"], False, False),
    ("ix_conversations_private_updated", "conversations", ["is_private", "updated_at", "id"], False, False),
    ("uq_messages_conversation_seq", "messages", ["conversation_id", "seq"], True, False),
    ("ix_images_conversation", "images", ["conversation_id"], False, False),
    ("ix_images_message", "images", ["message_id"], False, False),
    ("ix_images_file_path", "images", ["file_path"], False, False),
    ("ix_images_expires", "images", ["expires_at"], False, False),
    ("ix_stream_sessions_started", "stream_sessions", ["started_at", "id"], False, False),
    (
        "ix_stream_sessions_conversation_started",
        "stream_sessions",
        ["conversation_id", "started_at", "id"],
        False,
        False,
    ),
    ("ix_stream_sessions_status_started", "stream_sessions", ["status", "started_at", "id"], False, False),
    ("ix_stream_sessions_message", "stream_sessions", ["message_id"], False, False),
    ("ix_stream_sessions_active_owner", "stream_sessions", ["owner"], False, True),
    ("ix_stream_sessions_active_expiry", "stream_sessions", ["owned_until_ms"], False, True),
    ("uq_stream_sessions_active_conversation", "stream_sessions", ["conversation_id"], True, True),
)


def upgrade() -> None:
    for table, columns in _OURS.items():
        _add_missing(table, columns)
    for table, column, value in _FILLINGS:
        op.execute(f"UPDATE {table} SET {column} = {value} WHERE {column} IS NULL")
    for table in _CHAT_SERVICE:
        _make_times_utc(table)
    _number_messages()
    _close_second_streams()
    for table in _CHAT_SERVICE:
        _tighten(table)
    for name, table, index_columns, unique, active in _INDEXES:
        where = _ACTIVE if active else None
        op.create_index(name, table, index_columns, unique=unique, sqlite_where=where, postgresql_where=where)
    _create_security()


def downgrade() -> None:
    op.drop_table("password_attempts")
    op.drop_table("signing_keys")
    for name, table, *_ in reversed(_INDEXES):
        op.drop_index(name, table)
    for table, columns in _OURS.items():
        with op.batch_alter_table(table) as batch:
            for name, _, _ in columns:
                batch.drop_column(name)


def _on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _add_missing(table: str, columns: Iterable[tuple[str, Any, bool]]) -> None:
    """Add the columns without their constraints: rows must be filled first."""
    present = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}
    for name, kind, _ in columns:
        if name not in present:
            op.add_column(table, sa.Column(name, kind))


def _make_times_utc(table: str) -> None:
    columns = [name for name, kind, _ in _CHAT_SERVICE[table] if kind is _TIME]
    if _on_sqlite():
        for column in columns:
            _respell(table, column)
        return
    for found in sa.inspect(op.get_bind()).get_columns(table):
        name = found["name"]
        if name in columns and not getattr(found["type"], "timezone", True):
            op.alter_column(table, name, type_=_TIME, postgresql_using=f"{name} AT TIME ZONE 'UTC'")


def _respell(table: str, column: str) -> None:
    """Give SQLite's text times the one spelling that sorts: others use T, Z, offsets, or numbers."""
    bind = op.get_bind()
    found = bind.execute(
        sa.text(f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL AND {column} NOT GLOB :spelling"),
        {"spelling": _CANONICAL},
    )
    try:
        changes = [{"old": old, "new": _utc(old).strftime("%Y-%m-%d %H:%M:%S.%f")} for (old,) in found]
    except (ValueError, OverflowError) as error:
        raise InvalidConfig(f"{table}.{column} of the database holds something that is not a point in time.") from error
    if changes:
        bind.execute(sa.text(f"UPDATE {table} SET {column} = :new WHERE {column} = :old"), changes)


def _utc(value: str | int | float) -> datetime:
    """A time as the chat service may have spelled it: ISO 8601 (UTC unless it says otherwise), or seconds or ms."""
    if isinstance(value, int | float) or value.strip().isdigit():
        number = float(value)
        # Seconds since 1970 stay below 1e11 until the year 5138; milliseconds passed it in 1973.
        return datetime.fromtimestamp(number / 1000 if number > 1e11 else number, UTC)
    when = datetime.fromisoformat(value.strip())
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def _number_messages() -> None:
    """Number the messages of each conversation as they were written, even within one second."""
    # Where the row lies, which for rows that were never changed is when it came.
    written = "rowid" if _on_sqlite() else "ctid"
    op.execute(
        "UPDATE messages SET seq = ranked.place FROM (SELECT id AS ranked_id, row_number() OVER "
        f"(PARTITION BY conversation_id ORDER BY timestamp, created_at, {written}) AS place FROM messages) AS ranked "
        "WHERE ranked.ranked_id = messages.id"
    )


def _close_second_streams() -> None:
    """Leave each conversation one active session, the newest: from here on there can be no more."""
    op.execute(
        "UPDATE stream_sessions SET status = 'ERROR', termination_reason = 'ERROR', ended_at = updated_at, "
        "error_message = 'The reply was never finished.' WHERE status = 'ACTIVE' AND EXISTS ("
        "SELECT 1 FROM stream_sessions AS newer WHERE newer.status = 'ACTIVE' "
        "AND newer.conversation_id = stream_sessions.conversation_id "
        "AND (newer.started_at, newer.id) > (stream_sessions.started_at, stream_sessions.id))"
    )


def _tighten(table: str) -> None:
    """Make the required columns NOT NULL; SQLite rebuilds the table for that, foreign keys and types included."""
    recreate, shape = ("always", _shape(table)) if _on_sqlite() else ("never", None)
    with op.batch_alter_table(table, recreate=recreate, copy_from=shape) as batch:  # type: ignore[arg-type]
        for name, kind, optional in _CHAT_SERVICE[table] + _OURS[table]:
            if name != "id":
                batch.alter_column(name, existing_type=sa.types.to_instance(kind), nullable=optional)


def _shape(table: str) -> sa.Table:
    columns = [_column(table, *column) for column in _CHAT_SERVICE[table] + _OURS[table]]
    known = {column.name for column in columns}
    others = [column for column in sa.inspect(op.get_bind()).get_columns(table) if column["name"] not in known]
    columns += [sa.Column(column["name"], column["type"], nullable=True) for column in others]
    return sa.Table(table, sa.MetaData(), *columns)


def _column(table: str, name: str, kind: Any, optional: bool) -> sa.Column[Any]:
    if name == "id":
        return sa.Column(name, kind, primary_key=True)
    # The reply's message is no parent of its session: the session outlives it.
    parent = None if (table, name) == ("stream_sessions", "message_id") else _PARENTS.get(name)
    keys = [sa.ForeignKey(parent, ondelete="CASCADE")] if parent else []
    return sa.Column(name, kind, *keys, nullable=optional)


def _create_security() -> None:
    op.create_table(
        "signing_keys",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
    )
    op.create_table(
        "password_attempts",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("conversation_id", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("attempted_at", _TIME, nullable=False),
    )
    op.create_index("ix_password_attempts_who", "password_attempts", ["conversation_id", "address", "attempted_at"])
    op.create_index("ix_password_attempts_when", "password_attempts", ["attempted_at"])
