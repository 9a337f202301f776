"""Bad input ends with one line that names it, exit code 2, and no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.cli import generate as generate_module
from fathom.cli.main import run
from fathom.config import WEIGHTS
from tests.cli.conftest import Piped, Script

ROOT = Path(__file__).parent.parent.parent
ASK = ["generate", "--prompt", "hello"]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--effort", "huge"], ["huge", "none, high or max"]),
        (["--temperature", "-1"], ["temperature -1.0", "from 0"]),
        (["--temperature", "nan"], ["temperature nan"]),
        (["--top-p", "0"], ["top_p 0.0"]),
        (["--max-tokens", "0"], ["max_tokens 0", "at least 1"]),
        (["--max-tokens", "many"], ["--max-tokens"]),
        (["--seed", "-3"], ["seed -3"]),
        (["--model", "no-such-folder"], ["no-such-folder"]),
        (["--model", "flash"], ["flash", "without weights"]),
        (["--threads", "0"], ["--threads"]),
        (["--threads", "100000"], ["--threads", "1024"]),
        (["--device", "tpu"], ["tpu", "cpu, cuda"]),
        (["--device", "cuda:99"], ["cuda:99", "not there"]),
        (["--colour", "red"], ["--colour"]),
        (["--ids", "1,x"], ["1,x", "0,17,4"]),
        (["--ids", "1", "--prompt", "hello"], ["--prompt", "--ids"]),
        (["--model", "no\nsuch"], ["no such"]),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_flags(capsys: pytest.CaptureFixture[str], pipe: Piped, verb: str, flags: list[str], words: list[str]) -> None:
    if verb == "chat" and "--ids" in flags:
        words = ["--ids"]
    pipe(b"hello\n")
    fails(capsys, [verb, *flags], *words)


@pytest.mark.parametrize(
    "value", ['"max_tokens": "many"', '"max_tokens": 0', '"context": 1.5', '"temperature": "hot"', '"top_p": 2']
)
def test_settings_of_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, value: str) -> None:
    shutil.copytree(WEIGHTS / "small", tmp_path, dirs_exist_ok=True)
    (tmp_path / "fathom.json").write_text("{" + value + "}")
    fails(capsys, [*ASK, "--model", str(tmp_path)], "fathom.json", value.split('"')[1])


def test_a_folder_that_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, [*ASK, "--model", str(tmp_path)], str(tmp_path), "config.json")
    (tmp_path / "config.json").write_text("{")
    fails(capsys, [*ASK, "--model", str(tmp_path)], "config.json", "JSON")


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["genrate"], "genrate")


@pytest.mark.usefixtures("with_tiny")
def test_a_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str], pipe: Piped) -> None:
    fails(capsys, ["generate", "--effort", "none", "--prompt", "1" * 300], "30", "tokens", "200")
    pipe(b"1" * 300)
    assert run(["chat"]) == 2
    assert "holds 200" in capsys.readouterr().err


@pytest.mark.usefixtures("with_tiny")
def test_token_ids_that_the_model_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["generate", "--ids", "0,5,99999"], "99999", "place 2")
    fails(capsys, ["generate", "--ids=-1"], "-1")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_pipe_that_is_not_utf8(capsys: pytest.CaptureFixture[str], pipe: Piped, script: Script, verb: str) -> None:
    pipe("hä".encode("latin-1"))
    fails(capsys, [verb], "UTF-8", "0xe4", "place 1")
    assert script.prompts == []


@pytest.mark.usefixtures("script")
def test_a_flag_that_is_not_utf8(capsys: pytest.CaptureFixture[str], pipe: Piped) -> None:
    flag = os.fsdecode("hä".encode("latin-1"))
    fails(capsys, ["generate", "--prompt", flag], "UTF-8", "0xe4", "place 1")
    pipe(b"hello\n")
    fails(capsys, ["chat", "--system", flag], "UTF-8", "0xe4", "place 1")


@pytest.mark.parametrize("minutes", ["0", "-5", "nan", "inf"])
def test_a_run_without_an_end(capsys: pytest.CaptureFixture[str], tmp_path: Path, minutes: str) -> None:
    fails(capsys, ["train", "tiny", "--out", str(tmp_path), "--minutes", minutes], "minutes", "out of range")


def test_a_run_that_cannot_begin(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train = ["train", "tiny", "--workers", "0", "--out", str(tmp_path)]
    fails(capsys, [*train, "--device", "tpu"], "tpu", "cpu, cuda")
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    fails(capsys, [*train, "--resume"], "checkpoint.pt", "cannot be read")


@pytest.mark.usefixtures("script")
def test_no_prompt(capsys: pytest.CaptureFixture[str], pipe: Piped) -> None:
    pipe(b"\n")
    fails(capsys, ["generate"], "empty")


def test_a_full_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(generate_module, "open_chat", full)
    fails(capsys, ASK, "No space left", "model.safetensors")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_being_interrupted_is_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate_module, "open_chat", stop)
    assert run(ASK) == code
    assert "Traceback" not in capsys.readouterr().err


def command(
    *arguments: str, stdin: bytes = b"", stdout: object = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "fathom.cli.main", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, input=stdin, stdout=stdout, stderr=subprocess.PIPE, env=env)  # type: ignore[call-overload]


def test_the_real_command() -> None:
    done = command("generate", "--model", "no-such-folder", stdin=b"hello")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        done = command("--help", stdout=full)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


def test_closed_streams_are_empty_ones() -> None:
    line = [sys.executable, "-m", "fathom.cli.main", "generate"]
    closed = f"import os; os.close(0); os.close(1); os.execv({line[0]!r}, {line!r})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", closed], stderr=subprocess.PIPE, env=env)
    assert (done.returncode, done.stderr) == (2, b"error: the prompt is empty\n")


def test_a_terminal_that_lacks_a_character_is_no_reason_to_fail() -> None:
    program = "from fathom.cli import main; main.run = lambda _: print('für') or 0; main.main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"f?r\n", b"")


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "generate" in capsys.readouterr().out


@pytest.mark.usefixtures("with_tiny")
def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ASK, "--json", "--max-tokens", "5", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == ""
    assert told["usage"]["completion_tokens"] == len(told["token_ids"]) <= 5
    assert {"text", "thinking", "tool_calls", "finish", "tokens_per_second"} <= told.keys()
