"""An independent client on ``/v1``: what GuideLLM measures beside what this repository's own client measures.

``python -m benchmarks.scenarios.referee`` sends the same prompts to the same server, once with each client in every
round, 8 at a time. Neither is a target: ratios far from 1 would say that one of the clients is wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arrivals import Planned, Prompts, plan
from benchmarks.client import Load
from benchmarks.models import ensure, model_id
from benchmarks.protocol import Contender, Result, measure, parser, rounds_of
from benchmarks.servers import PeerMissing, Server, program, rotunda

STREAMS, TOKENS, SIZE = 8, 64, "5M"
OURS, THEIRS = "this client", "GuideLLM"


def planned(server: Server, requests: int, seed: int) -> list[Planned]:
    return plan([server.model], requests, seed=seed, max_tokens=TOKENS, prompts=Prompts(128, 0.5))


def own(server: Server, requests: int) -> Contender:
    def one_round(seed: int) -> dict[str, float]:
        run = asyncio.run(Load(server.url, server.surface, concurrency=STREAMS).run(planned(server, requests, seed)))
        found = run.whole(OURS)
        return {
            "ttft_p50_ms": found["median_ttft_ms"],
            "itl_p50_ms": found["median_itl_ms"],
            "e2el_p50_ms": found["median_e2el_ms"],
            "output_throughput": found["output_throughput"],
        }

    return Contender(OURS, one_round, server.processes)


def referee(server: Server, requests: int, tokenizer: Path, guidellm: str) -> Contender:
    def one_round(seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            return _figures(_run(guidellm, server, planned(server, requests, seed), tokenizer, Path(folder)))

    return Contender(THEIRS, one_round, server.processes, changing=True)


def _run(guidellm: str, server: Server, asked: Sequence[Planned], tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Its report on these requests."""
    data, report = folder / "prompts.jsonl", folder / "report.json"
    rows = ({"prompt": one.prompt, "output_tokens_count": one.max_tokens} for one in asked)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "run",
        *("--backend", f"kind=openai_http,target={server.url},model={server.model},request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=json_file,path={data}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={len(asked)}"),
        *("--output", f"kind=json,path={report}"),
        "--disable-progress",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder)}
    ran = subprocess.run(
        [guidellm, *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    if ran.returncode or not report.exists():
        raise RuntimeError(f"{THEIRS} failed: {ran.stderr[-2000:]}{ran.stdout[-1000:]}")
    return dict(json.loads(report.read_text()))


def _figures(report: dict[str, Any]) -> dict[str, float]:
    (benchmark,) = report["benchmarks"]
    found = benchmark["metrics"]

    def of(name: str, figure: str = "median") -> float:
        return float(found[name]["successful"][figure])

    failed = found["request_totals"]["errored"]
    if failed:
        raise RuntimeError(f"{THEIRS}: {failed} requests failed")
    return {
        "ttft_p50_ms": of("time_to_first_token_ms"),
        "itl_p50_ms": of("inter_token_latency_ms"),
        "e2el_p50_ms": of("request_latency") * 1000,
        "output_throughput": of("output_tokens_per_second", "mean"),
    }


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    given = arguments.parse_args()
    requests = 16 if given.quick else 64
    result = Result.begin("referee", "An independent client on /v1: GuideLLM and this repository's", given)
    result.settings |= {"streams": STREAMS, "requests": requests, "tokens": TOKENS, "prompt": "128 words ± 50 %"}
    try:
        guidellm = program("guidellm", "guidellm")
    except PeerMissing as missing:
        result.problems.append(str(missing))
        result.write()
        return
    model = {"model": model_id(SIZE), "num_cpus": 1, "min_replicas": 1, "max_concurrency": STREAMS}
    with rotunda([model], sizes=[SIZE], surface="completions") as server:
        contenders = [own(server, requests), referee(server, requests, ensure([SIZE]) / model_id(SIZE), guidellm)]
        found = measure(contenders, rounds_of(given), given.seed, f"{STREAMS} streams:")
        for what, figure, unit in (
            ("TTFT p50", "ttft_p50_ms", "ms"),
            ("gap between tokens, p50", "itl_p50_ms", "ms"),
            ("whole reply, p50", "e2el_p50_ms", "ms"),
            ("output tokens/s", "output_throughput", "tokens/s"),
        ):
            result.add(found, found.ratio(f"{what}: {OURS} over {THEIRS}", OURS, THEIRS, figure, unit))
        result.details["rounds"] = found.rounds
    result.write()


if __name__ == "__main__":
    main()
