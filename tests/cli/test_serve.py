"""`fathom serve` as a process: it starts, answers real clients, ends on a signal, and refuses what cannot be."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from fathom.checkpoint.random import write_random
from fathom.cli.main import run
from fathom.config import WEIGHTS, ModelConfig
from fathom.server.database import open_database
from fathom.server.keys import Keyring, Limits
from fathom.server.metering import read_rows
from fathom.server.prices import LISTS

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    command = [sys.executable, "-m", "fathom.cli.main", "serve", "--port", "0", "--database", url(folder), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    found = re.search(r"http://[\d.:]+", first)
    assert found, first + process.stderr.read()
    try:
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/fathom.db"


def test_it_serves_real_clients_and_books_what_they_used(tmp_path: Path) -> None:
    with serving(tmp_path, "--kv-disk-dir", str(tmp_path / "kv"), "--log") as (process, address):
        command = [sys.executable, str(ROOT / "examples" / "client.py"), address]
        said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
        assert said.splitlines()[0].endswith("42") and "get_time({'city': 'Paris'})" in said
        assert httpx.get(address).text.startswith("<!doctype html>")
        assert httpx.get(f"{address}/status").json()["requests"] == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0
    rows = list(read_rows(open_database(url(tmp_path))))
    assert [(r.protocol, r.finish) for r in rows] == [("chat", "stop"), ("messages", "stop")]
    assert (tmp_path / "kv").stat().st_mode & 0o077 == 0 or list((tmp_path / "kv").rglob("*"))


def test_with_keys_nobody_else_is_served(tmp_path: Path) -> None:
    key, secret = Keyring(open_database(url(tmp_path))).create("ann", Limits())
    with serving(tmp_path, "--host", "0.0.0.0") as (_, address):
        local = address.replace("0.0.0.0", "127.0.0.1")
        body = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
        refused = httpx.post(f"{local}/v1/chat/completions", json=body)
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": secret}):
            assert httpx.post(f"{local}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code == 200
        shown = httpx.get(f"{local}/status", headers={"authorization": f"Bearer {secret}"}).json()["ledger"]
        assert [row["key"] for row in shown] == [f"ann ({key.id})"] and shown[0]["requests"] == 2


NUMBERS = {
    "type": "object",
    "properties": {"n": {"type": "array", "items": {"type": "integer"}, "minItems": 3000}},
    "required": ["n"],
}
"""What takes longer to write than any test waits."""

LONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Count."}],
        "thinking": {"type": "disabled"},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBERS}},
        "max_tokens": 20_000,
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": "Count."}],
        "thinking": {"type": "disabled"},
        "tools": [{"name": "count", "input_schema": NUMBERS}],
        "tool_choice": {"type": "any"},
        "max_tokens": 20_000,
    },
    "/v1/responses": {
        "input": "Count.",
        "reasoning": {"effort": "none"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": NUMBERS}},
        "max_output_tokens": 20_000,
    },
}


def streamed(address: str, path: str, said: list[str]) -> None:
    """The raw text of an answer, as far as it comes."""
    body = {"model": "small", "stream": True, **LONG[path]}
    with suppress(httpx.TransportError), httpx.stream("POST", address + path, json=body, timeout=60) as answer:
        said.append("")
        for text in answer.iter_text():
            said[-1] += text


def repeated(address: str) -> int:
    """How much of a long prompt was in the cache."""
    body = {"model": "small", "messages": [{"role": "user", "content": "7," * 400}], "max_tokens": 1}
    usage = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    return int(usage["prompt_cache_hit_tokens"])


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.external)])
def test_the_end_in_the_middle_of_streams(tmp_path: Path, signals: int) -> None:
    """Every stream ends with the reason and is booked, the cache is kept; a second signal does not wait for them."""
    flags = ("--kv-disk-dir", str(tmp_path / "kv"), "--grace", "1" if signals == 1 else "60")
    said: dict[str, list[str]] = {path: [] for path in LONG}
    with serving(tmp_path, *flags) as (process, address):
        assert repeated(address) == 0
        threads = [Thread(target=streamed, args=(address, path, parts)) for path, parts in said.items()]
        for thread in threads:
            thread.start()
        eventually(lambda: all(parts and parts[0].count("data:") > 2 for parts in said.values()))
        time.sleep(0.5)
        begun = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health")
        assert process.wait(40) == 0 and time.monotonic() - begun < 40
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
        for thread in threads:
            thread.join(10)
    rows = {row.protocol: row for row in read_rows(open_database(url(tmp_path))) if row.output > 1}
    assert set(rows) == {"chat", "messages", "responses"}
    assert {row.finish for row in rows.values()} == {"shutting_down"}
    assert all("the server is shutting down" in parts[0].rstrip().splitlines()[-1] for parts in said.values())
    if signals == 1:
        with serving(tmp_path, *flags) as (_, address):
            assert repeated(address) >= 256


def test_a_busy_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", "--port", str(port), "--database", url(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot listen on 127.0.0.1:{port}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "is reachable from outside and there are no keys"),
        (["--model", "flash"], "'flash' is a configuration without weights"),
        (["--database", "nonsense"], "cannot be opened"),
        (["--bill-as", "gpt-2"], "no prices for 'gpt-2'"),
        (["--kv-gb", "0"], "--kv-gb 0 is out of range: it must be from 0.001"),
        (["--kv-disk-gb", "0"], "--kv-disk-gb 0 is out of range: it must be from 0.001"),
        (["--config", "missing.toml"], "--config missing.toml"),
        (["--max-body-mb", "-1"], "--max-body-mb -1 is out of range"),
        (["--max-body-mb", "nan"], "--max-body-mb nan is out of range"),
        (["--grace", "inf"], "--grace inf is out of range"),
        (["--kv-gb", "nan"], "--kv-gb nan is out of range"),
        (["--cors", "chat.example.org"], "--cors 'chat.example.org' is no origin"),
        (["--cors", "https://chat.example.org/"], "is no origin: write https://chat.example.org"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    database = [] if "--database" in flags else ["--database", url(tmp_path)]
    assert run(["serve", "--port", "0", *database, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("command", [("serve", "--database"), ("keys", "list", "--database"), ("cost", "--ledger")])
def test_a_ledger_of_a_newer_version_is_refused_in_one_line(
    tmp_path: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    database = open_database(url(tmp_path))
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0099'"))
    database.dispose()
    assert run([*command, url(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: ") and "was made by a newer fathom: update this one" in said and said.count("\n") == 1
    )


def test_a_price_list_with_a_gap_stops_the_start_and_names_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["mine,2026-01-01T00:00Z,2026-02-01T00:00Z,1,2,3,,,", "# a remark", "mine,2026-03-01T00:00Z,,1,2,3,,,"]
    header = next(line for line in (LISTS / "deepseek.csv").read_text().splitlines() if line.startswith("model,"))
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]))
    assert run(["serve", "--database", url(tmp_path), "--price-list", str(tmp_path / "mine.csv")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/mine.csv, line 4: 'mine' has no price from 2026-02-01 00:00 to 2026-03-01 00:00" in said
    assert said.startswith("error: ") and said.count("\n") == 1


def test_settings_from_a_file_and_the_flag_that_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fathom.toml"
    path.write_text(f'database = "{url(tmp_path)}"\nhost = "0.0.0.0"\nport = 0\n')
    assert run(["serve", "--config", str(path)]) == 2
    assert "--host 0.0.0.0 is reachable" in capsys.readouterr().err
    path.write_text('colour = "blue"\n')
    assert run(["serve", "--config", str(path)]) == 2
    assert "unknown setting 'colour'; known are allow_open" in capsys.readouterr().err


EVERY = """
model = "small"
host = "0.0.0.0"
port = 0
max-context = 4096
max-seqs = 8
kv-gb = 0.1
kv-host-gb = 0.1
kv-disk-dir = "FOLDER/kv"
kv-disk-gb = 0.5
device = "cpu"
tp = 1
threads = 1
dialect = "april"
strict-deepseek-compat = true
isolate-messages-users = true
allow-open = false
database = "sqlite:///FOLDER/fathom.db"
bill-as = "deepseek-v4-pro"
price-list = []
cors = ["https://a.example", "https://b.example"]
max-requests = 100
max-body-mb = 1.5
grace = 5
log = true
"""


def test_every_flag_may_stand_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are read, and none is missing here: the start goes as far as the door that is open to anybody."""
    (tmp_path / "all.toml").write_text(EVERY.replace("FOLDER", str(tmp_path)))
    assert run(["serve", "--config", str(tmp_path / "all.toml")]) == 2
    assert "--host 0.0.0.0 is reachable" in capsys.readouterr().err
    (tmp_path / "none.toml").write_text("no_such = 1\n")
    assert run(["serve", "--config", str(tmp_path / "none.toml")]) == 2
    known = capsys.readouterr().err.strip().partition("known are ")[2].split(", ")
    assert set(known) - {"config", "help"} == {
        line.split(" =")[0].replace("-", "_") for line in EVERY.split("\n") if line
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cors = 3", "cors must be a list of strings"),
        ('cors = "https://a.example"', "cors must be a list of strings"),
        ("log = 1", "log must be true or false"),
        ("port = true", "port must be one value"),
        ("port = [1]", "port must be one value"),
        ('port = "x"', "Invalid value for '--port'"),
        ("port = ", "Invalid value"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_one_line(
    tmp_path: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.toml").write_text(line + "\n")
    assert run(["serve", "--config", str(tmp_path / "wrong.toml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def two_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, with a tokenizer, that two processes can share."""
    path = tmp_path_factory.mktemp("models") / "wide"
    config = replace(ModelConfig.load(WEIGHTS / "small"), moe_intermediate_size=256)
    write_random(path, config, companions=WEIGHTS / "small")
    return path


def followers(leader: int) -> list[int]:
    """The processes that a server has started: Linux says so in files, which go as processes do."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = file.read_text().rpartition(")")[2].split()
            found += [int(file.parent.name)] if int(parent) == leader and state != "Z" else []
    return found


def is_there(pid: int) -> bool:
    """Whether a process runs; one that nobody has fetched does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def said(address: str, **changed: Any) -> httpx.Response:
    body = {"model": "wide", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}], **changed}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)


def test_two_processes_serve_one_model_and_leave_together(tmp_path: Path, two_parts: Path) -> None:
    with serving(tmp_path, "--model", str(two_parts), "--tp", "2") as (process, address):
        (other,) = followers(process.pid)
        answers = [said(address, temperature=0).json()["choices"] for _ in range(2)]
        assert answers[0] == answers[1] and answers[0][0]["finish_reason"] == "length"
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0 and not is_there(other)
    with serving(tmp_path, "--model", str(two_parts), "--tp", "2") as (process, address):
        (other,) = followers(process.pid)
        process.kill()
        eventually(lambda: not is_there(other), 20)


def test_without_one_of_its_processes_a_server_says_so_and_ends(tmp_path: Path, two_parts: Path) -> None:
    with serving(tmp_path, "--model", str(two_parts), "--tp", "2") as (process, address):
        assert process.stderr is not None
        body = {"model": "wide", "max_tokens": 100_000, "stream": True, "temperature": 0}
        body["messages"] = [{"role": "user", "content": "hi"}]
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(followers(process.pid)[0], signal.SIGKILL)
            rest = "\n".join(lines)
        assert '"error"' in rest and "rank 1 has ended" in rest
        assert process.wait(40) == 2
        assert process.stderr.read().splitlines()[-1].startswith("error: rank 1 has ended")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "2"], ["moe_intermediate_size (128)", "2 equal parts"]),
        (["--tp", "2", "--device", "cuda:0"], ["cuda:0"]),
        (["--tp", "1000", "--device", "cuda"], ["cuda"]),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    assert run(["serve", "--port", "0", "--database", url(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words)
