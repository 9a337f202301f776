"""What `decode.py` and `prefill.py` share: parts of a measurement that are kept one by one, and the page of them all.

A part is taken in under two minutes and replaces the part of its name in results/gpu.json; the page, results/gpu.md, is
written anew from whatever parts there are, each under the machine, the versions and the commit that it was taken with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fathom.cli.bench_table import breakdown, grid, heading, remarks, rows_of
from fathom.errors import FathomError

RESULTS = Path(__file__).parent / "results"
Part = Callable[[], dict[str, Any]]

TARGETS: Mapping[str, tuple[float | None, float | None]] = {
    "decode 4096 x 1, fp8 keys, ms": (3.3, 2.75),
    "decode 131072 x 1, fp8 keys, ms": (4.13, 3.03),  # 1.25 and 1.1 times that of 4K
    "decode 1048576 x 1, fp8 keys, ms": (4.13, 3.03),
    "decode 4096 x 8, fp8 keys, ms": (9, 7),
    "decode 4096 x 32, fp8 keys, ms": (22, 16),
    "decode 131072 x 32, fp8 keys, ms": (22, 16),
    "prefill of 32768, tok/s": (20_000, 30_000),
    "prefill of 1048576, tok/s": (8_738, 14_980),  # 120 s and 70 s
    "KV of a sequence of 1048576, fp8 keys, GB": (4.183, None),  # 8.3 and 7.6 % of V3.2's
    "KV of a sequence of 1048576, fp4 keys, GB": (3.831, None),
    "first token, s, 6 graphs": (30, None),
    "first token, s, 12 graphs": (30, None),
    "decode after 1024, times transformers": (25, 35),
    "decode after 8192, times transformers": (25, 35),
    "2 GPUs, decode 4096 x 1, fp8 keys, ms": (3.85, 3.3),
    "2 GPUs, prefill of 32768, tok/s": (20_000, 30_000),
}
"""Asked and stretch by what the page calls a figure (`figures`); milliseconds, tokens a second, seconds, or times."""


def take(parts: Mapping[str, Part]) -> None:
    """The command line: take the named parts, or all, and write both files after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help=f"some of {','.join(parts)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.md")
    parser.add_argument("--commit", help="of this tree, where it is no clone")
    given = parser.parse_args()
    leads = os.environ.get("RANK", "0") == "0"  # of torchrun's processes the first writes
    names = given.only.split(",") if given.only else list(parts)
    if unknown := set(names) - set(parts):
        parser.error(f"unknown part {min(unknown)}: use {', '.join(parts)}")
    for name in names:
        begin = time.perf_counter()
        try:
            report = parts[name]()
        except FathomError as error:
            parser.error(str(error))
        if not leads:
            continue
        report["commit"] = given.commit or report["commit"]
        kept = load(given.out) | {name: {**report, "took": time.perf_counter() - begin}}
        store(given.out, kept)
        print("\n".join(_shown(name, kept[name])), flush=True)


def load(folder: Path) -> dict[str, Any]:
    """The parts that there are, in the folder or else in the repository."""
    for path in (folder / "gpu.json", RESULTS / "gpu.json"):
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
    return {}


def store(folder: Path, parts: Mapping[str, Any]) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json.dumps(parts, indent=1)), ("gpu.md", "\n".join(page(parts)))):
        aside = folder / f".{name}"
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(folder / name)


def page(parts: Mapping[str, Any]) -> Iterator[str]:
    """The page: figures in one table, then every part with its own."""
    yield "# Speed on one H200, and on two"
    yield ""
    yield from _NOTES
    cells = [_figure(name, *values) for name, values in figures(parts).items()]
    yield from grid(("what", "measured", "with sums", "floor", "x floor", "asked", "stretch"), cells)
    for name, report in parts.items():
        yield ""
        yield from _shown(name, report)


_NOTES = (
    "Written by `python benchmarks/decode.py` and `python benchmarks/prefill.py`, part by part (`--only`); all figures",
    "are in `gpu.json`, medians. One rank of two computes its share of the model alone on one GPU: the sums over both",
    "are counted by measured rates and stand apart. In parts named `pair` both ranks run, on two GPUs, and sum.",
    "Floors: bytes at 4.3 TB/s, FLOPs at 1,580 (FP8) and 790 TFLOP/s.",
    "",
)


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[float, float | None, float | None]]:
    """Every figure's name, and what was measured first, the same with the sums over ranks, and its floor."""
    found: dict[str, tuple[float, float | None, float | None]] = {}
    for report in parts.values():
        for row in report.get("rows", ()):
            for name, values in _figures_of(report, row).items():
                found.setdefault(name, values)
        if first := report.get("first_token"):
            graphs = first.get("graphs", len(first["sizes"]))
            found[f"first token, s, {graphs} graphs"] = (first["seconds"], None, None)
        for row in report.get("engine", ()):
            found[f"decode {row['context']} x {row['batch']} by an engine, ms"] = (1e3 * row["seconds"], None, None)
    return found


def _figures_of(report: dict[str, Any], row: dict[str, Any]) -> dict[str, tuple[float, float | None, float | None]]:
    if report.get("peer"):
        return {f"decode after {row['context']}, times {report['peer']}": (row["ratio"], None, None)}
    sums, own = row["seconds"] + row["all_reduce_seconds"], "" if report["model"] == "flash" else f"{report['model']}, "
    own += f"{report['ranks']} GPUs, " if report["together"] else ""
    if report["mode"] == "prefill":
        tokens, name = row["context"], f"{own}prefill of {row['context']}, tok/s"
        return {name: (tokens / row["seconds"], tokens / sums, tokens / row["floor_seconds"])}
    made = f", a cache for {report['max_context']}" if report.get("max_context") else ""
    name = f"{own}decode {row['context']} x {row['batch']}, {report['keys']} keys{made}, ms"
    kept = {f"{own}KV of a sequence of {row['context']}, {report['keys']} keys, GB": (
        row["kv_bytes"] / 1e9, None, row["kv_counted"] / 1e9
    )}  # fmt: skip
    return {name: (1e3 * row["seconds"], 1e3 * sums, 1e3 * row["floor_seconds"])} | kept


def _figure(name: str, measured: float, sums: float | None, floor: float | None) -> tuple[str, ...]:
    ratio = None if floor is None else max(measured / floor, floor / measured)
    return (name, *map(_number, (measured, sums, floor, ratio, *TARGETS.get(name, (None, None)))))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _shown(name: str, report: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield from heading(report)
    yield ""
    if "rows" in report:
        yield from grid(*rows_of(report))
        yield ""
        yield from remarks(report)
    if first := report.get("first_token"):
        graphs = f"{first.get('graphs', len(first['sizes']))} graphs, of {first['sizes']} sequences"
        yield f"First token {first['seconds']:.1f} s after the weights were in place, with {graphs}."
    for row in report.get("engine", ()):
        step = f"{1e3 * row['seconds']:.2f} ms a step, the median of {row['steps']}"
        yield f"{row['batch']} answers after {row['context']} tokens, by an engine: {step}."
    if report.get("launches"):
        yield ""
        yield from breakdown(report["launches"])
