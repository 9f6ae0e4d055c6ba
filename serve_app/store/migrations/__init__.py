"""The history of the schema, for Alembic. ``serve_app.store.migrate`` runs it."""
