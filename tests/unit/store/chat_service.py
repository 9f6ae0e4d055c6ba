"""A database as the chat service leaves it: loose columns, an extra one, several spellings of time."""

from __future__ import annotations

CHAT_SERVICE_TABLES = """
CREATE TABLE conversations (id VARCHAR PRIMARY KEY, tab_name VARCHAR(255) NOT NULL, llm_model VARCHAR NOT NULL,
  is_private INTEGER DEFAULT 0, password_hash TEXT, created_at DATETIME DEFAULT CURRENT_TIMESTAMP, updated_at DATETIME);
CREATE TABLE messages (id VARCHAR PRIMARY KEY, conversation_id VARCHAR REFERENCES conversations(id), text TEXT,
  sender VARCHAR CHECK (sender IN ('user', 'llm')), timestamp DATETIME, created_at DATETIME, has_images BOOLEAN);
CREATE TABLE images (id VARCHAR PRIMARY KEY, conversation_id VARCHAR, message_id VARCHAR REFERENCES messages(id),
  filename TEXT, file_path TEXT, file_size INTEGER, mime_type TEXT, content_hash TEXT, created_at TEXT,
  expires_at TEXT, deleted_at TEXT);
CREATE TABLE stream_sessions (id VARCHAR PRIMARY KEY, conversation_id VARCHAR NOT NULL, model VARCHAR, status VARCHAR,
  started_at DATETIME, updated_at DATETIME, ended_at DATETIME, partial_response TEXT, token_count INTEGER,
  termination_reason VARCHAR, error_message TEXT, timeout_ms INTEGER NOT NULL DEFAULT 0, created_at DATETIME);
CREATE INDEX ix_messages_of_theirs ON messages(conversation_id);
ALTER TABLE conversations ADD COLUMN colour TEXT DEFAULT 'blue';
"""

CHAT_SERVICE_ROWS = """
INSERT INTO conversations (id, tab_name, llm_model, is_private, password_hash, created_at, updated_at) VALUES
  ('c1', 'First', 'llama3', 0, NULL, '2024-05-01T10:00:00.000Z', '2024-05-01T12:00:00+02:00'),
  ('c2', 'Second', 'llama3', 1, '$2b$04$abc', 1711958400000, '2024-04-01 08:00:00');
INSERT INTO messages (id, conversation_id, text, sender, timestamp, created_at, has_images) VALUES
  ('z-first', 'c1', 'hello', 'user', '2024-05-01 10:00:00', '2024-05-01 10:00:00', 0),
  ('a-second', 'c1', 'hello to you', 'llm', '2024-05-01 10:00:00', '2024-05-01 10:00:00', 0),
  ('third', 'c1', 'look', 'user', '2024-05-01T10:00:01Z', '2024-05-01 10:00:01', 1);
INSERT INTO images VALUES ('i1', 'c1', 'third', 'cat.png', 'ab/cat.png', 5, 'image/png', 'ab', '2024-05-01T10:00:01Z',
  NULL, NULL);
INSERT INTO stream_sessions (id, conversation_id, model, status, started_at, updated_at, partial_response, token_count,
  timeout_ms, created_at) VALUES
  ('s-old', 'c1', 'llama3', 'ACTIVE', '2024-05-01 10:00:00', '2024-05-01 10:00:02', 'half', 1, 30000, '2024-05-01'),
  ('s-new', 'c1', 'llama3', 'ACTIVE', '2024-05-01 10:00:05', '2024-05-01 10:00:09', 'half a rep', 3, 30000,
   '2024-05-01'),
  ('s-done', 'c2', 'llama3', 'COMPLETED', '2024-04-01 08:00:00', '2024-04-01 08:00:09', 'done', 1, 30000, '2024-05-01');
"""
