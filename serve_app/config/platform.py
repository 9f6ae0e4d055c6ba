"""The YAML files under ``configs/``: the platform and the defaults of discovered models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from serve_app.config.args import (
    Args,
    ModelArgs,
    OptionValue,
    RemoteArgs,
    UpstreamArgs,
    check_overrides,
    provider_name,
)
from serve_app.config.report import invalid, problems_of
from serve_app.config.values import Bytes
from serve_app.domain.errors import InvalidConfig

AnyArgs = TypeVar("AnyArgs", bound=Args)


class Capacity(Args):
    """Caps on what the models may use of each node; absent = all that Ray offers."""

    cpus: float | None = Field(default=None, gt=0)
    """CPUs of a node."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of a node."""
    memory_bytes: Annotated[Bytes, Field(ge=1)] | None = None
    """Memory of a node, for instance 12GiB."""


class ProviderArgs(RemoteArgs):
    """One remote provider of the platform."""

    name: str
    """Name of the provider, as in ``provider/model``."""

    _name = field_validator("name")(provider_name)

    def upstream(self) -> UpstreamArgs:
        """The arguments of the application that serves it."""
        return UpstreamArgs.read(self.model_dump(exclude={"name"}, exclude_unset=True) | {"provider": self.name})


class Platform(Args):
    """``configs/platform.yaml``: what is structural. The defaults are those of a file that does not exist."""

    capacity: Capacity = Capacity()
    """Caps on what the models may use."""
    max_deployed: int = Field(default=32, ge=1, le=1000)
    """Most discovered models that keep a Serve application; the coldest one goes first."""
    keep_deployed_s: float = Field(default=120, ge=0, le=86_400)
    """How long a discovered model keeps its Serve application when it is not in memory."""
    providers: tuple[ProviderArgs, ...] = ()
    """Remote providers."""
    aliases: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Other names of models: alias to id or ``provider/id``, or to several of which the best placed one answers."""
    fallbacks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Which models answer, in this order, when one cannot."""
    settings: dict[str, OptionValue] = Field(default_factory=dict)
    """Settings by their lower-case names, weaker than the environment."""

    @field_validator("settings")
    @classmethod
    def _known(cls, value: dict[str, OptionValue]) -> dict[str, OptionValue]:
        check_overrides(value)
        return value

    @field_validator("aliases")
    @classmethod
    def _one_step(cls, value: dict[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
        for alias, target in value.items():
            targets = (target,) if isinstance(target, str) else target
            for each in targets:
                if each in value:
                    raise ValueError(f"the alias {alias} points to another alias ({each})")
            if not targets or len(set(targets)) < len(targets):
                raise ValueError(f"the alias {alias} must name models, each once")
        return value

    @field_validator("fallbacks")
    @classmethod
    def _others(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for model, others in value.items():
            if model in others or len(set(others)) < len(others):
                raise ValueError(f"the fallbacks of {model} must be other models, each once")
        return value

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [provider.name for provider in self.providers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several providers are called {', '.join(twice)}")
        return self


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; raises ``InvalidConfig`` that names the file and the line."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise invalid([f"{path}: the file cannot be read ({error.strerror})."]) from None
    except UnicodeDecodeError:
        raise invalid([f"{path}: the file is not UTF-8 text."]) from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise invalid([f"{path}: {line}this is not YAML ({error.problem})."]) from None
    except yaml.YAMLError:
        raise invalid([f"{path}: this is not YAML."]) from None


def read_file(path: Path, kind: type[AnyArgs]) -> AnyArgs:
    """One YAML file as ``kind``; raises ``InvalidConfig`` with all its problems."""
    data = read_yaml(path)
    if data is not None and not isinstance(data, dict):
        raise invalid([f"{path}: the file must hold a mapping."])
    try:
        return kind.model_validate(data or {})
    except ValidationError as error:
        raise invalid(problems_of(error, kind, str(path))) from None


def read_models(folder: Path) -> dict[str, ModelArgs]:
    """The defaults of models by id, from every ``*.yaml`` in ``folder``; empty when there is no such folder.

    Raises ``InvalidConfig`` with the problems of all files, two files for one model included.
    """
    found: dict[str, ModelArgs] = {}
    problems: list[str] = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            args = read_file(path, ModelArgs)
        except InvalidConfig as error:
            problems.extend(error.details["problems"])
            continue
        if args.model in found:
            problems.append(f"{path}: another file already holds {args.model}.")
        found[args.model] = args
    if problems:
        raise invalid(problems)
    return found
