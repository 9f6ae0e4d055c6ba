"""Configuration: settings of the process, the platform file, and the arguments of Serve applications.

``load()`` reads everything once, at the start of a process, and raises one report of all that is wrong.
"""

from serve_app.config.args import GatewayArgs, ModelArgs, UpstreamArgs
from serve_app.config.exposure import check_exposure, check_nodes, is_loopback
from serve_app.config.platform import Capacity, Platform, ProviderArgs, read_models
from serve_app.config.redaction import SecretUrl, redact_url
from serve_app.config.settings import Settings
from serve_app.config.sources import Loaded, load, read_secret
from serve_app.config.table import SETTINGS, Setting

__all__ = [
    "SETTINGS",
    "Capacity",
    "GatewayArgs",
    "Loaded",
    "ModelArgs",
    "Platform",
    "ProviderArgs",
    "SecretUrl",
    "Setting",
    "Settings",
    "UpstreamArgs",
    "check_exposure",
    "check_nodes",
    "is_loopback",
    "load",
    "read_models",
    "read_secret",
    "redact_url",
]
