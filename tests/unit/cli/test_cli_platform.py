"""The commands against the platform's own surfaces, over a socket."""

import asyncio
import json
from pathlib import Path

from typer.testing import CliRunner, Result

from serve_app.cli.app import app
from serve_app.cli.run import Outside
from tests.doubles import build_services


async def run(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, words, obj=Outside())


async def test_the_commands_and_the_server_speak_the_same_language(tmp_path: Path) -> None:
    platform = await build_services(tmp_path)
    try:
        url = await platform.serve()
        listed = json.loads((await run("models", "--json", "--url", url)).stdout)
        assert listed["models"]
        name = listed["models"][0]
        assert name in (await run("models", "--url", url)).stdout
        result = await run("chat", name, "Hello [[tokens=3]]", "--json", "--url", url)
        assert result.exit_code == 0, result.output
        reply = json.loads(result.stdout)
        assert (reply["status"], reply["usage"]["completionTokens"]) == ("complete", 3)
        again = ["chat", name, "More [[tokens=3]]", "--conversation", reply["conversationId"], "--url", url]
        assert (await run(*again)).stdout.strip()
        unknown = await run("chat", "no-such-model", "Hello", "--url", url)
        assert unknown.exit_code == 2
        assert "no-such-model" in unknown.stderr
    finally:
        await platform.close()
