"""The files of deploy/, checked with the programs that read them, as far as these are installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fathom.cli.main import app
from tests.server.conftest import Opener

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "fathom.json").read_text())


def flags() -> set[str]:
    """What `fathom serve` takes."""
    import typer.main

    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {name for parameter in serve.params for name in (*parameter.opts, *parameter.secondary_opts)}


def program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_image_and_the_compose_file_use_flags_that_exist() -> None:
    docker = (DEPLOY / "Dockerfile").read_text()
    lines = [
        json.loads(line.split(" ", 1)[1]) for line in docker.splitlines() if line.startswith(("ENTRYPOINT", "CMD"))
    ]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    words = [*lines[0], *lines[1], *compose["services"]["fathom"]["command"]]
    used = {word for word in words if word.startswith("--")}
    assert lines[0][:2] == ["fathom", "serve"] and len(used) > 3 and used <= flags()
    copied = re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())
    mounted = [v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", ()) if v[0] == "."]
    assert len(mounted) == 4 and all((DEPLOY / name).is_file() for name in mounted)


@pytest.mark.external
def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "fathom.service").read_text()
    (tmp_path / "fathom.service").write_text(unit.replace("/opt/fathom/.venv/bin/fathom", sys.executable))
    checked = subprocess.run(
        [program("systemd-analyze"), "verify", str(tmp_path / "fathom.service")], capture_output=True, text=True
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """A Prometheus with our configuration, but this target."""
    config = (DEPLOY / "prometheus.yml").read_text().replace("fathom:8000", target).replace("5s", "1s")
    (folder / "prometheus.yml").write_text(config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--web.listen-address={address}"]
    process = subprocess.Popen([*command, f"--storage.tsdb.path={folder}/data"], stderr=subprocess.DEVNULL)
    try:
        yield httpx.Client(base_url=f"http://{address}", transport=httpx.HTTPTransport(retries=8))
    finally:
        process.kill()
        process.wait()


@pytest.mark.external
def test_prometheus_answers_every_question_of_the_dashboard(open_real: Opener, tmp_path: Path) -> None:
    promtool = program("promtool")
    subprocess.run([promtool, "check", "config", DEPLOY / "prometheus.yml"], check=True, capture_output=True)
    asked = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    with open_real(tmp_path / "kv") as site, prometheus(tmp_path, site.url.removeprefix("http://")) as server:
        end, empty = time.monotonic() + 60, set(asked)
        while empty and time.monotonic() < end:
            site.chat("7," * 200, max_tokens=3, stream=True)
            site.raw.post("/v1/chat/completions", content=b"{")
            answers = {e: server.get("/api/v1/query", params={"query": e}).json() for e in asked}
            assert all(answer["status"] == "success" for answer in answers.values()), answers
            empty = {expression for expression, answer in answers.items() if not answer["data"]["result"]}
            time.sleep(1)
        assert not empty
