"""``rotunda pull``: a model from the Hugging Face hub into the model store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from serve_app.cli.run import Json, clean, guarded, print_json, size, warn
from serve_app.config import load
from serve_app.domain.errors import (
    Forbidden,
    InvalidInput,
    ModelLoadFailed,
    NotFound,
    ProviderError,
    ProviderUnavailable,
    RotundaError,
)

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README*")
"""No pickled weights and no code: such a model would be refused anyway."""


@guarded
def pull(
    repo: Annotated[str, typer.Argument(help="Repository on the hub, as org/name.", show_default=False)],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    as_json: Json = False,
) -> None:
    """Download a model from the Hugging Face hub into the model store; a running server finds it there.

    A download that was interrupted goes on when it is called again. HF_TOKEN opens what is gated.
    """
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise InvalidInput(f"{repo!r} is not the name of a repository, such as org/name.")
    loaded = load()
    warn(loaded.warnings)
    target = loaded.settings.hf_model_path / repo
    _download(repo, revision, target)
    from serve_app.engines.discovery import inspect  # reads tensors' headers; the other commands start without it

    info = inspect(target, repo, loaded.settings.hf_default_task)
    if as_json:
        print_json({"id": info.id, "path": info.path, "sizeBytes": info.size_bytes, "problem": info.problem})
    else:
        typer.echo(clean(f"{info.id}: {size(info.size_bytes) or 'unknown size'} in {target}"))
    if info.problem:
        raise ModelLoadFailed(f"{repo} was downloaded, but it cannot be used: {info.problem}")


def _download(repo: str, revision: str | None, target: Path) -> None:
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot_download(repo, revision=revision, local_dir=target, allow_patterns=list(WANTED))
    except errors.GatedRepoError as error:
        raise Forbidden(
            f"{repo} is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(f"The hub has no repository {repo}, or it is private: then set HF_TOKEN.") from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no revision {revision}.") from error
    except errors.HFValidationError as error:
        raise InvalidInput(f"{repo!r} is not the name of a repository, such as org/name.") from error
    except errors.HfHubHTTPError as error:
        raise ProviderError(
            f"The hub answered {error.response.status_code}. Try again later.", retryable=True
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise _unreachable() from error
    except OSError as error:
        raise ModelLoadFailed(f"{target} cannot be written ({error.strerror or type(error).__name__}).") from error


def _unreachable() -> RotundaError:
    return ProviderUnavailable(
        "The Hugging Face hub cannot be reached (or HF_HUB_OFFLINE is set). HF_ENDPOINT names a mirror; or copy the "
        "model's folder into the model store."
    )
