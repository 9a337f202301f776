"""`fathom bench`: how fast a model decodes and reads prompts on this machine, and what its ops cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.config import WEIGHTS, ModelConfig, preset
from fathom.errors import CheckpointError, ConfigError

MODES = ("decode", "prefill", "kernels")
PEERS = ("transformers",)
_FOREIGN = {"decode": (), "prefill": ("tokens",), "kernels": ("context", "batch", "tokens", "peer")}
"""The flags that mean nothing in a mode."""


def bench(
    mode: Annotated[str, typer.Argument(help="What to measure: decode, prefill or kernels.")],
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or small; kernels: flash and pro too.")] = "small",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of each prompt; 512 if absent.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences side by side; 1 if absent.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens decoded in a run; 64 if absent.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs, of which the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; if absent, one and all cores are tried.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute in fp32 or bf16; if absent, both are tried.")] = None,
    peer: Annotated[str | None, typer.Option(help="Measure the same weights in transformers, in turns.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as the last line.")] = False,
) -> None:
    """Measure the speed of a model on this machine."""
    given = {"context": context, "batch": batch, "tokens": tokens, "peer": peer}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    _check(mode, chosen, dtype)
    if mode == "kernels":
        report = _ops(model, dtype or "fp32", threads, runs)
    else:
        from fathom.cli.bench_run import Job, measure

        job = Job(mode=mode, runs=runs, threads=threads, dtype=dtype, **chosen)
        report = measure(_folder(model), job)
    report = {"model": model, **report}
    print("\n".join([heading(report), "", *table(report), *remarks(report)]))
    if as_json:
        print(json.dumps(report))


def _check(mode: str, chosen: dict[str, Any], dtype: str | None) -> None:
    if mode not in MODES:
        raise ConfigError(f"unknown benchmark '{mode}': use {', '.join(MODES)}")
    for name in _FOREIGN[mode]:
        if name in chosen:
            raise ConfigError(f"--{name} means nothing to bench {mode}: leave it out")
    if dtype not in (None, "fp32", "bf16"):
        raise ConfigError(f"--dtype '{dtype}' is unknown: use fp32 or bf16")
    if chosen.get("peer", PEERS[0]) not in PEERS:
        raise ConfigError(f"--peer '{chosen['peer']}' is unknown: use {', '.join(PEERS)}")


def _folder(model: str) -> Path:
    if model in ("flash", "pro"):
        raise CheckpointError(f"'{model}' is a configuration without weights: give a checkpoint's folder, or small")
    return WEIGHTS / "small" if model == "small" else Path(model)


def _ops(model: str, dtype: str, threads: int | None, runs: int) -> dict[str, Any]:
    config = preset(model) if model in ("flash", "pro") else ModelConfig.load(_folder(model))
    import torch

    from fathom.cli.bench_ops import measure_ops
    from fathom.cli.bench_run import machine

    rows = measure_ops(config, dtype, threads, runs)
    return {"mode": "kernels", "dtype": dtype, "threads": torch.get_num_threads(), **machine(), "rows": rows}


# --- words


def heading(report: dict[str, Any]) -> str:
    """What was measured, where, and of which commit, in two lines."""
    r = report
    what = f"{r['mode']} of {r.get('model', 'a model')}"
    if r["mode"] == "kernels":
        what += f", {r['dtype']}, {_threads(r['threads'])}"
    else:
        after = "after" if r["mode"] == "decode" else "of"
        what += f" {after} {r['context']} tokens x {r['batch']}, median of {r['runs']} runs"
    return f"{what}\n{r['cpu']}, {r['cores']} cores, torch {r['torch']}, commit {r['commit']}"


def table(report: dict[str, Any]) -> list[str]:
    """The rows as a Markdown table, columns in line."""
    lines = {"decode": _decode, "prefill": _prefill, "kernels": _kernel}[report["mode"]]
    head = {
        "decode": ("side", "dtype", "threads", "ms a step", "lowest-highest", "tok/s", "MB read", "GB/s", "peak MB"),
        "prefill": ("side", "dtype", "threads", "ms", "lowest-highest", "tok/s", "peak MB"),
        "kernels": ("op", "shape", "rows", "µs"),
    }[report["mode"]]
    cells = [head, *(lines(row) for row in report["rows"])]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]]


def remarks(report: dict[str, Any]) -> Sequence[str]:
    """The comparison with a peer, in words."""
    if report.get("ratio") is None:
        return []
    ours, theirs = (report["best"][side] for side in ("fathom", report["peer"]))
    better = (f"{row['side']} {row['dtype']} with {_threads(row['threads'])}" for row in (ours, theirs))
    return [
        "",
        f"{report['ratio']:.2f} times as fast: {' against '.join(better)}.",
        "One BF16 export, activations not quantised on either side; "
        f"logits after the prompt differ by {report['agreement']:.1e} of the largest.",
    ]


def _decode(row: dict[str, Any]) -> tuple[str, ...]:
    read, rate = row["read_bytes"] / 1e6, row["bytes_per_second"] / 1e9
    return (*_common(row, 2), f"{row['tokens_per_second']:.1f}", f"{read:.1f}", f"{rate:.2f}", _peak(row))


def _prefill(row: dict[str, Any]) -> tuple[str, ...]:
    return (*_common(row, 0), f"{row['tokens_per_second']:.0f}", _peak(row))


def _kernel(row: dict[str, Any]) -> tuple[str, ...]:
    return row["op"], row["shape"], str(row["rows"]), f"{row['us']:.1f}"


def _common(row: dict[str, Any], digits: int) -> tuple[str, ...]:
    middle, low, high = (f"{1e3 * row[name]:.{digits}f}" for name in ("seconds", "low", "high"))
    return row["side"], row["dtype"], str(row["threads"]), middle, f"{low}-{high}"


def _peak(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 1e6:.0f}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
