-- A database as the chat service leaves it: loose columns, and one that is not in its documentation.
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
