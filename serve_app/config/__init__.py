"""Configuration: settings of the process, the platform file, and the arguments of Serve applications.

``load()`` reads everything once, at the start of a process, and raises one report of all that is wrong.
"""

from serve_app.config.args import GatewayArgs, ModelArgs, UpstreamArgs
from serve_app.config.exposure import check_exposure, check_nodes, is_loopback
from serve_app.config.platform import Capacity, Platform, ProviderArgs, read_models
from serve_app.config.redaction import SecretUrl, redact_url
from serve_app.config.serve_file import ServeFile, read_serve_file
from serve_app.config.settings import Settings
from serve_app.config.sources import DOTENV, PLATFORM, Loaded, load, read_secret
from serve_app.config.table import SETTINGS, Setting

__all__ = [
    "DOTENV",
    "PLATFORM",
    "SETTINGS",
    "Capacity",
    "GatewayArgs",
    "Loaded",
    "ModelArgs",
    "Platform",
    "ProviderArgs",
    "SecretUrl",
    "ServeFile",
    "Setting",
    "Settings",
    "UpstreamArgs",
    "check_exposure",
    "check_nodes",
    "is_loopback",
    "load",
    "read_models",
    "read_secret",
    "read_serve_file",
    "redact_url",
]
