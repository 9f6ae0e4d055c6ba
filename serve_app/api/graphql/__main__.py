"""Writes ``schema.graphql`` beside this module: ``python -m serve_app.api.graphql``."""

from serve_app.api.graphql.schema import PRINTED, build_schema

PRINTED.write_text(build_schema().as_str() + "\n", encoding="utf-8")
