"""Whether the settings suit where the server stands: who can reach it, and on how many nodes it runs."""

from __future__ import annotations

import ipaddress

from serve_app.config.report import invalid
from serve_app.config.settings import Settings


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, settings: Settings) -> tuple[str, ...]:
    """Judge the address that the HTTP server listens on; returns warnings.

    Raises ``InvalidConfig`` when other machines reach it and nothing asks who they are.
    """
    if is_loopback(host):
        return ()
    if not settings.api_keys and not settings.allow_anonymous:
        raise invalid(
            [
                f"The HTTP host {host!r} is reachable from other machines, and API_KEYS is not set. Set API_KEYS, "
                "listen on 127.0.0.1, or set ALLOW_ANONYMOUS=true to let everyone in."
            ]
        )
    warnings = []
    if not settings.api_keys:
        warnings.append(f"Everyone who reaches {host!r} may use this server (ALLOW_ANONYMOUS=true, no API_KEYS).")
    if all(is_loopback(name) for name in settings.allowed_hosts):
        warnings.append(
            f"The HTTP host is {host!r}, but ALLOWED_HOSTS holds only names of this machine: calls from others get 403."
        )
    return tuple(warnings)


def check_nodes(nodes: int, settings: Settings) -> None:
    """Raise ``InvalidConfig`` when several nodes would share a SQLite file."""
    if nodes > 1 and settings.database_url.get_secret_value().startswith("sqlite"):
        raise invalid(
            [f"DATABASE_URL is a SQLite file, but the cluster has {nodes} nodes. Several nodes need PostgreSQL."]
        )
