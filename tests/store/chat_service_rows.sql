-- What it may hold: several spellings of time, messages within one second, replies that never ended.
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
