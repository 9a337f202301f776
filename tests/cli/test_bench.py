"""`fathom bench`: what it prints adds up, both sides compute the same, and what it cannot do it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.accounting import layer_kinds, parameters
from fathom.checkpoint.random import write_random
from fathom.cli.bench_run import Job, measure
from fathom.cli.main import run
from fathom.config import ModelConfig
from fathom.errors import CheckpointError, ConfigError, ContextError
from tests.oracle import draw_config

CONFIG = ModelConfig.from_dict(
    draw_config(5, blocked=True, num_hidden_layers=3, compress_ratios=[0, 4, 128, 0], num_hash_layers=1)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "tiny"
    write_random(out, CONFIG, experts="fp4", linears="fp8")
    return out


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """The lines of a run with --json, and the object of the last one."""
    assert run(["bench", *arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(lines[-1])
    return lines[:-1], report


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert run(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert all(word in err for word in words), err


def test_decode_tells_speed_bytes_and_memory(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    sizes = ["--context", "130", "--tokens", "4", "--runs", "2", "--threads", "1", "--batch", "2"]
    lines, report = bench(capsys, "decode", "--model", str(folder), "--dtype", "fp32", *sizes)
    (row,) = report["rows"]
    assert (row["side"], row["dtype"], row["threads"]) == ("fathom", "fp32", 1)
    assert 0 < row["low"] <= row["seconds"] <= row["high"]
    assert row["tokens_per_second"] == pytest.approx(2 / row["seconds"])
    assert row["bytes_per_second"] == pytest.approx(row["read_bytes"] / row["seconds"])
    assert 50e6 < row["peak_bytes"] < 4e9
    assert report["cpu"] in lines[1] and report["commit"] in lines[1]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_a_step_reads_the_active_parameters(folder: Path) -> None:
    report = measure(folder, Job(mode="decode", context=4, tokens=1, runs=1, threads=1, dtype="fp32"))
    biases = layer_kinds(CONFIG)["scored"] * CONFIG.n_routed_experts  # a table beside the weights
    assert report["rows"][0]["read_bytes"] == 4 * (parameters(CONFIG).active - biases)


def test_every_dtype_that_is_left_open_is_tried(folder: Path) -> None:
    report = measure(folder, Job(mode="prefill", context=140, runs=1, threads=1))
    dtypes = [row["dtype"] for row in report["rows"]]
    assert set(dtypes) <= {"fp32", "bf16"} and len(dtypes) >= 1
    best = report["best"]["fathom"]
    assert best["seconds"] == min(row["seconds"] for row in report["rows"])
    assert best["tokens_per_second"] == pytest.approx(140 / best["seconds"])


def test_transformers_beside_us_on_the_same_weights(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    pytest.importorskip("transformers")
    sizes = ["--context", "40", "--tokens", "3", "--runs", "2", "--threads", "1", "--dtype", "fp32"]
    lines, report = bench(capsys, "decode", "--model", str(folder), "--peer", "transformers", *sizes)
    ours, theirs = report["rows"]
    assert (ours["side"], theirs["side"]) == ("fathom", "transformers")
    assert report["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert report["agreement"] < 1e-4
    assert f"{report['ratio']:.2f} times" in "\n".join(lines)


def test_kernels_of_a_configuration(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    _, report = bench(capsys, "kernels", "--model", str(folder), "--runs", "1", "--threads", "1")
    names = ["linear", "fp8_sim", "sinkhorn", "attend", "experts"]
    assert [(row["op"], row["rows"]) for row in report["rows"]] == [(op, n) for n in (1, 128) for op in names]
    assert all(row["us"] > 0 for row in report["rows"])
    assert report["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed"], ["speed", "decode, prefill, kernels"]),
        (["decode", "--dtype", "fp16"], ["fp16", "fp32 or bf16"]),
        (["decode", "--peer", "ollama"], ["ollama", "transformers"]),
        (["decode", "--model", "flash"], ["flash", "without weights"]),
        (["decode", "--model", "no-such-folder"], ["no-such-folder"]),
        (["decode", "--context", "0"], ["--context"]),
        (["decode", "--layers", "2"], ["--layers", "a CPU", "--device cuda"]),
        (["prefill", "--chunk", "256"], ["--chunk"]),
        (["decode", "--tp", "2"], ["--tp"]),
        (["prefill", "--tokens", "5"], ["--tokens", "prefill"]),
        (["kernels", "--peer", "transformers"], ["--peer", "kernels"]),
    ],
)
def test_what_it_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    fails(capsys, arguments, *words)


def test_a_prompt_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(ContextError, match=r"8193.*8192"):
        measure(folder, Job(mode="decode", context=8190, tokens=3))


def test_a_peer_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"nobody_peer\.py"):
        measure(folder, Job(mode="prefill", context=3, peer="nobody"))


def test_a_damaged_checkpoint_is_told_by_the_child(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -5 if file.suffix == ".safetensors" else None])
    with pytest.raises(CheckpointError, match=r"fathom cannot go on.*safetensors"):
        measure(tmp_path, Job(mode="prefill", context=3, threads=1, dtype="fp32"))
