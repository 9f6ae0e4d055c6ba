"""What a model will need, computed before it is loaded, against what its process then holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serve_app.engines import memory
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect
from tests.engine import tiny_models

MIB = 1024 * 1024
OPTIONS = EngineOptions(max_concurrency=2, context_length=512)
PROCESS = """
import asyncio, json, sys
from pathlib import Path
import psutil
from serve_app.domain.generation import GenerationRequest, Message, Options
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.transformers import create

def held():
    return psutil.Process().memory_full_info().pss

async def ask(path):
    info = inspect(Path(path), "m")
    engine = create(info, EngineOptions(max_concurrency=2, context_length=512))
    async def one(text):
        request = GenerationRequest("r", "m", (Message.of("user", text),), Options(max_tokens=64))
        return [item async for item in engine.generate(request)]
    await asyncio.gather(one("Hello " * 100), one("The quick brown fox. " * 20))
    found = held()
    await engine.close()
    return found

print(json.dumps([asyncio.run(ask(path)) for path in sys.argv[1:]]))
"""


@pytest.mark.skipif(not hasattr(psutil.Process(), "memory_full_info"), reason="needs PSS")
@pytest.mark.skipif(sys.platform != "linux", reason="needs PSS")
def test_what_a_process_holds_is_what_was_computed_before(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    wide = LlamaConfig(**(tiny_models.SIZES | {"hidden_size": 1024, "intermediate_size": 4096}))
    small = tiny_models.save_causal(tmp_path / "small")
    large = tiny_models.save_causal(tmp_path / "large", wide, eos_token_id=None)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    made = subprocess.run(
        [sys.executable, "-c", PROCESS, str(small), str(large)], env=environment, capture_output=True, check=True
    )
    before, after = json.loads(made.stdout.splitlines()[-1])
    need = memory.needed_bytes(inspect(large, "large"), OPTIONS)
    assert need.weights > 100 * MIB
    assert after <= need.total
    assert need.weights * 0.95 <= after - before <= need.weights + need.kv_cache + 48 * MIB
