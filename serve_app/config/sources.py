"""Where settings come from: arguments > environment > .env > platform.yaml > default. The only reader of os.environ."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream
from pydantic import SecretStr, ValidationError

from serve_app.config.args import NEVER_SECRETS
from serve_app.config.paths import at_home, inside, usable_store
from serve_app.config.platform import Platform, read_file
from serve_app.config.redaction import MASK, SecretUrl, redact_url
from serve_app.config.report import invalid, reason, suggestion
from serve_app.config.settings import Settings
from serve_app.config.table import BY_FIELD, ENVIRONMENT_ONLY, SETTINGS, Setting, plain
from serve_app.domain.errors import InvalidConfig

log = logging.getLogger(__name__)

DOTENV = Path(".env")
PLATFORM = Path("configs/platform.yaml")
OPENAI_URL = "https://api.openai.com/v1"
_NAMES = tuple(row.name for row in SETTINGS)
_READ_BY_MODELS = ("hf_model_path", "hf_default_task", "hf_enable_gpu")
_NOT_OURS = frozenset({"HF_HOME", "HF_TOKEN", "OPENAI_API_BASE", "OLLAMA_MODELS", "ROTUNDA_API_KEY", "ROTUNDA_URL"})


@dataclass(frozen=True, slots=True)
class Loaded:
    """What :func:`load` found.

    ``sources``: for each field "args", "environment", ".env", "platform.yaml" or "default". ``warnings``: what works
    but may surprise, one sentence each.
    """

    settings: Settings
    sources: Mapping[str, str]
    warnings: tuple[str, ...]
    platform: Platform


def load(
    environ: Mapping[str, str] | None = None,
    *,
    dotenv: Path | None = DOTENV,
    platform: Path | None = PLATFORM,
    args: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read and validate every setting, once, at the start of a process.

    Args:
        environ: the environment; None = that of the process.
        dotenv: the ``.env`` file; None = none. The default may be missing, another may not.
        platform: the platform file; the same holds.
        args: settings by their lower-case names (``GatewayArgs.settings``).

    Relative paths, these files included, start from ROTUNDA_HOME, which is the working directory unless it is set.

    Raises:
        InvalidConfig: everything that is wrong, as one report without secrets.
    """
    environment = os.environ if environ is None else environ
    problems: list[str] = []
    home = _home(environment, problems)
    layers = _Layers()
    file = _platform(at_home(platform, home), platform == PLATFORM, problems)
    layers.add("platform.yaml", file.settings)
    in_file = _dotenv(at_home(dotenv, home), dotenv == DOTENV, problems)
    layers.add(".env", _ours(in_file))
    layers.add("environment", _ours(environment))
    layers.add("args", _checked(args or {}, problems))
    layers.values["rotunda_home"] = home
    settings = _validated(layers, problems)
    if settings is None or problems:
        raise invalid(problems)
    warnings = [*_typos(environment, "the environment"), *_typos(in_file, ".env"), *layers.notes]
    settings = _resolved(settings, home, warnings)
    warnings += [*_partial(layers.sources), *_surprises(settings)]
    return Loaded(settings, layers.sources, tuple(warnings), file)


class _Layers:
    """Values and where they come from; what is added later wins."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = dict.fromkeys(BY_FIELD, "default")
        self.notes: list[str] = []

    def add(self, source: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in ENVIRONMENT_ONLY and source != "environment":
                self.notes.append(f"{name.upper()} in {source} is ignored: it is read from the environment only.")
                continue
            self.values[name] = value
            self.sources[name] = source


def _home(environment: Mapping[str, str], problems: list[str]) -> Path:
    given = environment.get("ROTUNDA_HOME", "").strip() or "."
    try:
        home = Path(given).expanduser().absolute()
        if home.is_dir():
            return home
    except (RuntimeError, ValueError, OSError):
        pass  # an unknown user after ~, a NUL character, a name too long: no folder either
    problems.append(f"ROTUNDA_HOME = {given!r} (environment): it is not a folder. Allowed: a folder that exists.")
    return Path.cwd()


def _platform(path: Path | None, may_be_missing: bool, problems: list[str]) -> Platform:
    if path is None or (may_be_missing and not path.exists()):
        return Platform()
    try:
        return read_file(path, Platform)
    except InvalidConfig as error:
        problems.extend(error.details["problems"])
        return Platform()


def _dotenv(path: Path | None, may_be_missing: bool, problems: list[str]) -> dict[str, str]:
    if path is None or (may_be_missing and not path.exists()):
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        problems.append(f"{path}: the file cannot be read as UTF-8 text.")
        return {}
    found, odd = parse_dotenv(text)
    # Its text is left out: it may be a key.
    problems.extend(f"{path}: line {line} is not NAME=value." for line in odd)
    return found


def parse_dotenv(text: str) -> tuple[dict[str, str], list[int]]:
    """The variables of a ``.env`` file, and the numbers of the lines that are none.

    ``$`` is not expanded, so that keys may hold it.
    """
    bindings = list(parse_stream(StringIO(text)))
    found = {each.key: each.value for each in bindings if each.key is not None and each.value is not None}
    odd = [each.original.line for each in bindings if each.error or (each.key is not None and each.value is None)]
    return found, odd


def _ours(variables: Mapping[str, str]) -> dict[str, str]:
    """Our settings among environment variables; an empty one counts as unset."""
    return {row.field: variables[row.name].strip() for row in SETTINGS if variables.get(row.name, "").strip()}


def _checked(args: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, value in args.items():
        row = BY_FIELD.get(name)
        if row is None:
            problems.append(f"args: the setting {name} is unknown; {suggestion(name, BY_FIELD)}")
        elif row.secret:
            problems.append(f"{row.name} (args): {NEVER_SECRETS}.")
        else:
            known[name] = value
    return known


def _validated(layers: _Layers, problems: list[str]) -> Settings | None:
    try:
        return Settings.model_validate(layers.values)
    except ValidationError as error:
        found = error.errors(include_url=False)
    wrong = {str(each["loc"][0]): each for each in found if each["loc"]}
    for name, each in wrong.items():
        row = BY_FIELD[name]
        given = _given(row, layers.values[name])
        problems.append(
            f"{row.name} = {given} ({layers.sources[name]}): {reason(each)}. Allowed: {row.allowed}; default: "
            f"{row.default or 'unset'}."
        )
    problems.extend(f"{reason(each)}." for each in found if not each["loc"])
    problems.extend(_between(layers.values, wrong))
    return None


def _between(values: Mapping[str, Any], wrong: Mapping[str, Any]) -> list[str]:
    """Contradictions between the values that are valid by themselves, when others are not."""
    if not wrong or any(name.startswith("memory_") for name in wrong):
        return []
    try:
        Settings.model_validate({name: value for name, value in values.items() if name not in wrong})
    except ValidationError as error:
        return [f"{reason(each)}." for each in error.errors(include_url=False) if not each["loc"]]
    return []


def _given(row: Setting, value: Any) -> str:
    if row.secret:
        return MASK
    text = redact_url(value) if isinstance(value, str) else plain(value)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _resolved(settings: Settings, home: Path, warnings: list[str]) -> Settings:
    """The settings with absolute paths, and with what one value implies for another."""
    default = home / BY_FIELD["hf_model_path"].default
    store, trouble = usable_store(inside(home, settings.hf_model_path), default)
    for sentence in trouble:
        log.error(sentence)
        warnings.append(sentence)
    changed: dict[str, Any] = {
        "hf_model_path": store,
        "image_storage_path": inside(home, settings.image_storage_path),
        "database_url": SecretUrl(_absolute_database(settings.database_url.get_secret_value(), home)),
    }
    if settings.openai_api_key and not settings.openai_base_url:
        changed["openai_base_url"] = SecretUrl(OPENAI_URL)
    return settings.model_copy(update=changed)


def _absolute_database(url: str, home: Path) -> str:
    prefix = "sqlite+aiosqlite:///"
    if not url.startswith(prefix):
        return url
    path, question, query = url.removeprefix(prefix).partition("?")
    return f"{prefix}{inside(home, Path(path))}{question}{query}"


def _typos(variables: Mapping[str, str], where: str) -> list[str]:
    """Warnings about names that are nearly one of ours."""
    prefixes = {name.partition("_")[0] + "_" for name in _NAMES}
    warnings = []
    for name in sorted(set(variables) - set(_NAMES) - _NOT_OURS):
        if not name.startswith(tuple(prefixes)):
            continue
        near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.87)
        if near:
            warnings.append(f"{name} in {where} is not a setting and has no effect; did you mean {near[0]}?")
    return warnings


def _partial(sources: Mapping[str, str]) -> list[str]:
    """Warnings about settings of the model replicas that stand where only the gateway reads them."""
    return [
        f"{field.upper()} in args reaches the gateway only; model replicas read it from their environment."
        for field in _READ_BY_MODELS
        if sources[field] == "args"
    ]


def _surprises(settings: Settings) -> list[str]:
    """What is valid but may not be what was meant."""
    warnings = []
    keys = [key.get_secret_value() for key in settings.api_keys]
    if len(set(keys)) < len(keys):
        warnings.append("API_KEYS holds the same key more than once.")
    if keys and settings.allow_anonymous:
        warnings.append("ALLOW_ANONYMOUS has no effect, because API_KEYS is set: every caller needs a key.")
    if settings.stream_session_timeout_ms < settings.hf_model_timeout_ms:
        warnings.append("STREAM_SESSION_TIMEOUT_MS is shorter than HF_MODEL_TIMEOUT_MS, which therefore never applies.")
    if "*" in settings.allowed_hosts:
        warnings.append("ALLOWED_HOSTS lets any Host header in, so web pages may reach this server by DNS rebinding.")
    url = settings.openai_base_url.get_secret_value() if settings.openai_base_url else ""
    if url and "/" not in url.partition("://")[2]:
        warnings.append("OPENAI_BASE_URL has no path; most servers expect it to end in /v1.")
    if settings.openai_base_url and url != OPENAI_URL and not settings.openai_api_key:
        warnings.append("OPENAI_BASE_URL is called without a key, because OPENAI_API_KEY is not set.")
    return warnings


def read_secret(
    variable: str | None = None,
    file: str | None = None,
    *,
    home: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> SecretStr | None:
    """The secret that stands in an environment variable or in a file; None when neither is named.

    Call it where the secret is used, never where arguments are made. Raises ``InvalidConfig`` when it is not there.
    """
    if variable:
        environment = os.environ if environ is None else environ
        value = environment.get(variable, "").strip()
        where = f"The environment variable {variable}"
    elif file:
        path = inside(home or Path.cwd(), Path(file))
        where = f"The file {file}"
        try:
            value = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise invalid([f"{where}, named as the place of a key, cannot be read."]) from None
    else:
        return None
    if not value:
        raise invalid([f"{where}, named as the place of a key, is empty."])
    return SecretStr(value)
