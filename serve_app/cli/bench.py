"""``rotunda bench``: load on a running server, and what came of it in vLLM's figures."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from serve_app.cli.run import DEFAULT_URL, FAILURE, Json, Url, guarded, print_json, table
from serve_app.domain.errors import InvalidInput

SURFACE_NAMES = "sse, graphql, chat or completions"
FIGURES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")


@guarded
def bench(
    models: Annotated[list[str], typer.Argument(help="Models to ask, the most wanted one first.", show_default=False)],
    requests: Annotated[int, typer.Option("--requests", min=1, help="How many requests.")] = 32,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Requests per second, sent when they are due (open loop).")
    ] = None,
    burstiness: Annotated[
        float, typer.Option("--burstiness", help="Of the gaps between them: 1 is Poisson, less is burstier.")
    ] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Most requests at once; without --rate a closed loop.")
    ] = None,
    surface: Annotated[str, typer.Option("--surface", help=f"Protocol: {SURFACE_NAMES}.")] = "sse",
    zipf: Annotated[float, typer.Option("--zipf", min=0, help="How unevenly the models are asked; 0 is evenly.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Words of a prompt, ± 50 %.")] = 128,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most new tokens of a reply.")] = 128,
    slo: Annotated[
        list[str] | None,
        typer.Option("--slo", help="Bound of a good reply, for instance ttft:200 (ms); repeatable: ttft, tpot, e2el."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals, models and prompts.")] = 0,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Put load on a server and measure it: time to first token, time per token, throughput, goodput.

    Without --rate and --concurrency, eight requests run at once.
    """
    from benchmarks.arrivals import Prompts, plan
    from benchmarks.client import Load, load_once, progress
    from benchmarks.surfaces import SURFACES
    from benchmarks.wire import Target

    if surface not in SURFACES:
        raise InvalidInput(f"There is no surface {surface!r}; it is one of {SURFACE_NAMES}.")
    bounds = _bounds(slo or [])
    try:
        Target.of(url)
        planned = plan(
            models, requests, seed=seed, max_tokens=max_tokens, prompts=Prompts(prompt_tokens, 0.5), rate=rate,
            burstiness=burstiness, zipf=zipf if len(models) > 1 else 0.0,
        )  # fmt: skip
    except ValueError as error:
        raise InvalidInput(f"{error}.") from error
    most = concurrency if concurrency or rate else 8
    run = load_once(Load(url, SURFACES[surface], most), planned, progress())
    found = run.metrics(bounds)
    if as_json:
        print_json({**found, "seed": seed, "request_rate": rate, "burstiness": burstiness, "max_concurrency": most})
    else:
        _show(found)
    if found["failed"]:
        raise typer.Exit(FAILURE)


def _bounds(given: list[str]) -> dict[str, float]:
    """``ttft:200`` → seconds by name."""
    from benchmarks.client import bounds

    try:
        return bounds(given)
    except ValueError as error:
        raise InvalidInput(f"{error}.") from error


def _show(found: dict[str, Any]) -> None:
    typer.echo(
        f"{found['completed']} of {found['num_prompts']} replies in {found['duration']:.1f} s: "
        f"{found['request_throughput']:.2f} requests/s, {found['output_throughput']:.1f} tokens/s"
    )
    for reason, count in found["errors"].items():
        typer.echo(f"failed: {count} × {reason}")
    if found["slo_attainment"] is not None:
        typer.echo(f"good: {found['slo_attainment']:.0%} of all sent, {found['request_goodput']:.2f} requests/s")
    kinds = ("mean", "median", "p90", "p99")
    rows = [(name.removesuffix("_ms").upper(), *(_ms(found[f"{kind}_{name}"]) for kind in kinds)) for name in FIGURES]
    table(("MS", *(kind.upper() for kind in kinds)), rows)


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
