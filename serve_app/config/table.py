"""The table of settings in words, read from the fields of :class:`serve_app.config.settings.Settings`."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from serve_app.config.redaction import SecretUrl
from serve_app.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table, in words. ``wrong`` is an example of a value that is refused."""

    name: str
    field: str
    group: str
    type: str
    unit: str
    default: str
    allowed: str
    meaning: str
    secret: bool
    wrong: str


def plain(value: Any) -> str:
    """A setting's value as it would stand in the environment; credentials are left out."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(plain(part) for part in value)
    return str(value.value if isinstance(value, Enum) else value)


def _kind(info: FieldInfo) -> Any:
    options = [option for option in get_args(info.annotation) if option is not types.NoneType]
    is_union = get_origin(info.annotation) in (Union, types.UnionType)
    return options[0] if is_union else info.annotation


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "choice"
    names: dict[Any, str] = {bool: "yes/no", int: "whole number", float: "number", Path: "path", str: "text"}
    names |= {SecretStr: "secret", SecretUrl: "address"}
    if get_origin(kind) is tuple:
        return "list"
    return names.get(kind) or names.get(get_origin(kind)) or _type_name(get_args(kind)[0])


def _allowed(kind: Any, info: FieldInfo, about: dict[str, Any]) -> str:
    if about["allowed"]:
        return str(about["allowed"])
    if kind is bool:
        return "true or false"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(choice.value) for choice in kind)
    low = next(limit.ge for limit in info.metadata if isinstance(limit, Ge))
    high = next(limit.le for limit in info.metadata if isinstance(limit, Le))
    unit = f", in {about['unit']}" if about["unit"] else ""
    return f"a {'whole ' if kind is int else ''}number from {low:,} to {high:,}{unit}"


def _row(field: str, info: FieldInfo) -> Setting:
    about: dict[str, Any] = info.json_schema_extra  # type: ignore[assignment]
    kind = _kind(info)
    return Setting(
        name=field.upper(),
        field=field,
        group=about["group"],
        type=_type_name(kind),
        unit=about["unit"],
        default=plain(info.default),
        allowed=_allowed(kind, info, about),
        meaning=info.description or "",
        secret=about["secret"],
        wrong=about["wrong"],
    )


SETTINGS: tuple[Setting, ...] = tuple(_row(field, info) for field, info in Settings.model_fields.items())
BY_FIELD: Mapping[str, Setting] = {row.field: row for row in SETTINGS}
ENVIRONMENT_ONLY = frozenset({"rotunda_home"})
"""Fields that no file and no argument can set, because the files are found through them."""
