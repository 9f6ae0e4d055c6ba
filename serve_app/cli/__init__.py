"""The command line, ``rotunda …``: a client of a running server, and the operator's checks before there is one."""

from serve_app.cli.app import app, main

__all__ = ["app", "main"]
