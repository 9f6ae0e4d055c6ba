"""Logging of a replica: one line a record, with the trace and whom it is about, and no text of prompts or replies."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar

PACKAGES = ("serve_app", "deployments")

_ABOUT: ContextVar[Mapping[str, str]] = ContextVar("rotunda.about")
"""What the present task works on. Only ever added to: the task ends with the request."""


def about(**facts: str | None) -> None:
    """Name in every later record of this task what it works on: ``trace_id``, ``session``, ``model``, ``provider``."""
    _ABOUT.set({**_ABOUT.get({}), **{name: value for name, value in facts.items() if value}})


class About(logging.Filter):
    """Adds the facts to every record; a JSON formatter writes them as fields of their own."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in _ABOUT.get({}).items():
            if not hasattr(record, name):
                setattr(record, name, value)
        return True


def set_up_logging(level: int = logging.INFO) -> None:
    """Send our packages' records to the replica's log (the handlers of ``ray.serve``), once per process."""
    handlers = logging.getLogger("ray.serve").handlers
    for handler in handlers:
        if not any(isinstance(known, About) for known in handler.filters):
            handler.addFilter(About())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        for handler in handlers:
            if handler not in logger.handlers:
                logger.addHandler(handler)
        logger.propagate = not handlers
