"""The log of the streams, and what a session keeps so that another ingress can go on with it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ADDED: tuple[tuple[str, Any], ...] = (
    ("wanted", sa.Text),
    ("question_id", sa.Text),
    ("idempotency_key", sa.Text),
    ("fingerprint", sa.Text),
    ("provider_stopped", sa.Boolean),
)


def upgrade() -> None:
    op.add_column("stream_sessions", sa.Column("epoch", sa.Integer, nullable=False, server_default=sa.text("1")))
    for name, kind in _ADDED:
        op.add_column("stream_sessions", sa.Column(name, kind))
    op.create_index("uq_stream_sessions_idempotency_key", "stream_sessions", ["idempotency_key"], unique=True)
    op.add_column("stream_sessions", sa.Column("has_log", sa.Boolean, nullable=False, server_default=sa.false()))
    logged = sa.text("has_log")
    op.create_index(
        "ix_stream_sessions_logged", "stream_sessions", ["ended_at"], sqlite_where=logged, postgresql_where=logged
    )
    op.create_table(
        "stream_events",
        sa.Column("session_id", sa.Text, sa.ForeignKey("stream_sessions.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("seq_to", sa.Integer, nullable=False),
        sa.Column("text_offset", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("lengths", sa.Text),
        sa.Column("payload", sa.Text),
        sa.Column("token_ids", sa.Text),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("revision", sa.Text),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    """Replies that run end with what the log has of them, as far as the older schema can hold it."""
    op.execute(
        f"UPDATE stream_sessions SET partial_response = COALESCE((SELECT {_joined()} FROM stream_events "
        "WHERE stream_events.session_id = stream_sessions.id), partial_response) WHERE status = 'ACTIVE'"
    )
    op.drop_table("stream_events")
    op.drop_index("ix_stream_sessions_logged", "stream_sessions")
    op.drop_index("uq_stream_sessions_idempotency_key", "stream_sessions")
    with op.batch_alter_table("stream_sessions") as batch:
        for name, _ in (*_ADDED, ("epoch", sa.Integer), ("has_log", sa.Boolean)):
            batch.drop_column(name)


def _joined() -> str:
    if op.get_bind().dialect.name == "sqlite":
        # Rows of one session lie, and so are read, in the order of their key.
        return "group_concat(text, '')"
    return "string_agg(text, '' ORDER BY seq)"
