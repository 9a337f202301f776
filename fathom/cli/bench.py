"""`fathom bench`: how fast a model decodes and reads prompts on this machine, and what its ops cost."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.config import WEIGHTS, ModelConfig, preset
from fathom.errors import CheckpointError, ConfigError

MODES = ("decode", "prefill", "kernels")
PEERS = ("transformers",)
KEYS = ("fp8", "fp4")
_MODE_FOREIGN = {"decode": ("chunk",), "prefill": ("tokens",), "kernels": ("context", "batch", "tokens", "peer")}
_CPU_FOREIGN = ("layers", "ratios", "tp", "rank-of-two", "index-keys", "chunk", "max-context")
_GPU_FOREIGN = ("tokens", "threads", "dtype")
_PROMPT_FOREIGN = ("batch", "peer", "max-context")
"""The flags that mean nothing in a mode, on a CPU, on a GPU, and to prefill there."""
PEER_CONTEXTS = (1024, 8192)
_RUNS = 5
_CONTEXTS: dict[str, tuple[int, ...]] = {"decode": (4096,), "prefill": (32768,)}
"""Runs on a CPU, and tokens on a GPU (with a peer, without), unless flags say it."""


def bench(
    mode: Annotated[str, typer.Argument(help="What to measure: decode, prefill or kernels.")],
    model: Annotated[
        str, typer.Option(help="A checkpoint's folder, or small; flash and pro for --synthetic.")
    ] = "small",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens before; 512 if absent, GPU: 4096, prefill 32768.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences side by side; 1 if absent.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="CPU: tokens decoded in a run; 64 if absent.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs, of which the median counts; 5, GPU: 30.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="If absent, one and all cores are tried.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="CPU: compute in fp32 or bf16; if absent, both are tried.")] = None,
    peer: Annotated[str | None, typer.Option(help="Measure the same weights in transformers, in turns.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; with --synthetic, cuda.")] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="GPU: random weights of the model's sizes.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Synthetic: only so many layers.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Synthetic: layers of these kinds: 0,4,128.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="GPU: ranks of tensor parallelism; 1 if absent.")] = None,
    rank_of_two: Annotated[bool, typer.Option("--rank-of-two", help="GPU: one rank of two, alone.")] = False,
    index_keys: Annotated[str | None, typer.Option(help="GPU: store index keys as fp8 (faster) or fp4.")] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="GPU decode: what the cache is made for; --context if absent.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="GPU prefill: tokens at a time; 8192 if absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as the last line.")] = False,
) -> None:
    """Measure the speed of a model on this machine."""
    given = {"context": context, "batch": batch, "tokens": tokens, "runs": runs, "threads": threads, "dtype": dtype}
    given |= {"peer": peer, "layers": layers, "ratios": ratios, "tp": tp, "rank-of-two": rank_of_two or None}
    given |= {"index-keys": index_keys, "chunk": chunk, "max-context": max_context}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    on_gpu = synthetic or (device or "cpu") != "cpu"
    _check(mode, chosen, on_gpu)
    if on_gpu:
        _measure_on_gpu(mode, model, device, synthetic, chosen, as_json)
        return
    if mode == "kernels":
        report = _ops(model, dtype or "fp32", threads, runs or _RUNS)
    else:
        from fathom.cli.bench_run import Job, measure

        report = measure(_folder(model), Job(mode=mode, **{"runs": _RUNS, **chosen}))
    report = {"model": model, **report}
    print("\n".join([heading(report), "", *table(report), *remarks(report)]))
    if as_json:
        print(json.dumps(report))


def _check(mode: str, chosen: dict[str, Any], on_gpu: bool) -> None:
    if mode not in MODES:
        raise ConfigError(f"unknown benchmark '{mode}': use {', '.join(MODES)}")
    if on_gpu and mode == "kernels":
        raise ConfigError("bench kernels measures on a CPU; on a GPU run `python benchmarks/kernels.py` from a clone")
    for name in _MODE_FOREIGN[mode]:
        if name in chosen:
            raise ConfigError(f"--{name} means nothing to bench {mode}: leave it out")
    _check_place(mode, chosen, on_gpu)
    known = {"dtype": ("fp32", "bf16"), "peer": PEERS, "index-keys": KEYS}
    for name, values in known.items():
        if chosen.get(name, values[0]) not in values:
            raise ConfigError(f"--{name} '{chosen[name]}' is unknown: use {' or '.join(values)}")


def _check_place(mode: str, chosen: dict[str, Any], on_gpu: bool) -> None:
    foreign = _CPU_FOREIGN if not on_gpu else _GPU_FOREIGN + (_PROMPT_FOREIGN if mode == "prefill" else ())
    for name in foreign:
        if name in chosen:
            place, hint = ("a GPU", "") if on_gpu else ("a CPU", ", or add --device cuda")
            raise ConfigError(f"--{name} means nothing to bench {mode} on {place}: leave it out{hint}")
    if on_gpu and "peer" in chosen and "batch" in chosen:
        raise ConfigError("--batch means nothing beside --peer on a GPU, which runs one sequence: leave it out")


def _measure_on_gpu(
    mode: str, model: str, device: str | None, synthetic: bool, chosen: dict[str, Any], as_json: bool
) -> None:
    from fathom.cli.bench_device import DeviceJob, measure
    from fathom.cli.bench_table import lines

    if device == "cpu":
        raise ConfigError("--synthetic makes a model on a GPU: leave out --device cpu")
    asked: dict[str, Any] = {
        "mode": mode,
        "model": model,
        "synthetic": synthetic,
        "device": device or "cuda",
    }
    asked |= _ranks(chosen)
    asked["ratios"] = _ratios(chosen.pop("ratios", None), "layers" in chosen)
    asked["keys"] = chosen.pop("index-keys", KEYS[0])
    asked["contexts"], asked["max_context"] = _contexts(mode, chosen), chosen.pop("max-context", None)
    report = measure(DeviceJob(**asked, **chosen))
    if os.environ.get("RANK", "0") != "0":
        return
    print("\n".join(lines(report)))
    if as_json:
        print(json.dumps(report))


def _contexts(mode: str, chosen: dict[str, Any]) -> tuple[int, ...]:
    if "context" in chosen:
        return (chosen.pop("context"),)
    return PEER_CONTEXTS if "peer" in chosen else _CONTEXTS[mode]


def _ranks(chosen: dict[str, Any]) -> dict[str, Any]:
    """Of how many ranks the model is one, and whether the others run as well."""
    tp, one = chosen.pop("tp", 1), chosen.pop("rank-of-two", False)
    if one and tp not in (1, 2):
        raise ConfigError(f"--rank-of-two measures one rank of two: leave out --tp {tp}")
    if tp > 1 and not one and os.environ.get("WORLD_SIZE") != str(tp):
        start = f"torchrun --nproc-per-node {tp} -m fathom.cli.main bench ..."
        raise ConfigError(f"--tp {tp} wants {tp} processes: start `{start}`, or measure one rank alone: --rank-of-two")
    return {"ranks": 2 if one else tp, "together": tp > 1 and not one}


def _ratios(text: str | None, layers: bool) -> tuple[int, ...] | None:
    if text is None:
        return None
    if layers:
        raise ConfigError("--ratios says how many layers there are: leave out --layers")
    parts = text.split(",")
    if not set(parts) <= {"0", "4", "128"}:
        raise ConfigError(f"--ratios '{text}' is no list of compression ratios: write 0,4,128")
    return tuple(int(part) for part in parts)


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
