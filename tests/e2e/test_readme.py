"""The README's own examples, run as they stand against the cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx

from tests.cluster import ROOT, Cluster

README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def at(cluster: Cluster, text: str) -> str:
    return text.replace(ADDRESS, cluster.url)


def test_the_curl_streams_a_right_answer(cluster: Cluster) -> None:
    command = next(block for block in blocks("console") if "curl" in block)
    command = command.split("$ ", 1)[1].split("\nid:", 1)[0].replace("\\\n", " ")
    answer = subprocess.run(shlex.split(at(cluster, command)), capture_output=True, text=True, timeout=120, check=True)
    tokens = re.findall(r'"token":\s*("(?:[^"\\]|\\.)*")', answer.stdout)
    assert "".join(json.loads(token) for token in tokens) == "17 + 25 = 42."
    assert "event: end" in answer.stdout


def test_the_python_example_prints_the_sum(cluster: Cluster) -> None:
    [code] = blocks("python")
    answer = subprocess.run(
        [sys.executable, "-c", at(cluster, code)], capture_output=True, text=True, timeout=120, check=True
    )
    assert answer.stdout.strip() == "17 + 25 = 42."


def test_the_graphql_example_answers(cluster: Cluster) -> None:
    [query] = blocks("graphql")
    answer = httpx.post(f"{cluster.url}/graphql", json={"query": query}, timeout=120).json()
    assert answer["data"]["addMessage"]["llmMessage"]["text"] == "17 + 25 = 42.", answer


def test_the_command_line_lists_and_chats(cluster: Cluster, tmp_path: Path) -> None:
    examples = next(block for block in blocks("console") if "rotunda chat" in block).splitlines()
    rotunda = Path(sys.executable).with_name("rotunda")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ROTUNDA_URL": cluster.url}

    def run(example: str) -> str:
        _, *arguments = shlex.split(example)
        ended = subprocess.run(
            [str(rotunda), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "rotunda/tiny-chat" in run(examples[0])
    assert "17 + 25 = 42." in run(examples[1])
