"""Logging of a replica: one line a record, the level from ``ROTUNDA_LOG_LEVEL``'s caller, no prompt or reply text."""

from __future__ import annotations

import logging

PACKAGES = ("serve_app", "deployments")


def set_up_logging(level: int = logging.INFO) -> None:
    """Send our packages' records to the replica's log (the handlers of ``ray.serve``), once per process."""
    handlers = logging.getLogger("ray.serve").handlers
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        for handler in handlers:
            if handler not in logger.handlers:
                logger.addHandler(handler)
        logger.propagate = not handlers
