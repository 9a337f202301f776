"""Everything that results/cpu.md says, measured again: `python benchmarks/cpu.py`, under eight minutes on two cores.

1. The embedded model: decode, and the wait from starting `fathom chat` to the first token of its answer.
2. A random model of 118.6 million parameters (tiny/config.json), side by side with transformers on the same weights.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from fathom.cli.bench import heading, remarks, table
from fathom.cli.bench_run import ROOT, Job, machine, measure
from fathom.config import WEIGHTS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FATHOM = [sys.executable, "-m", "fathom.cli.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

SMALL = Job(mode="decode", context=512, tokens=64, runs=5)
PAIRED = {
    "decode": Job(mode="decode", context=512, tokens=32, runs=5, peer="transformers"),
    "prefill 512": Job(mode="prefill", context=512, runs=5, peer="transformers"),
    "prefill 2048": Job(mode="prefill", context=2048, runs=3, peer="transformers"),
}
TARGETS = {"decode": 2.0, "prefill 512": 0.8, "prefill 2048": 1.5}
"""At least so many times as fast as transformers."""

SMALL_TARGET, FIRST_TARGET = 100.0, 5.0
"""Tokens a second of the embedded model, and the most seconds to the first token."""

_CHATS = 5


def main() -> None:
    """Measure, show while going, and write results/cpu.md and results/cpu.json."""
    begin, where = time.perf_counter(), machine()
    first = first_token()
    print(f"first token of fathom chat: {first['seconds']:.2f} s\n", flush=True)
    reports = {"small": _shown("the embedded model", measure(WEIGHTS / "small", SMALL))}
    with TemporaryDirectory() as temporary:
        weights = random_weights(Path(temporary))
        for name, job in PAIRED.items():
            reports[name] = _shown("118.6M random parameters", measure(weights, job))
    took = time.perf_counter() - begin
    RESULTS.mkdir(exist_ok=True)
    _write("cpu.json", json.dumps({**where, "took": took, "first_token": first, **reports}, indent=1) + "\n")
    _write("cpu.md", "\n".join(_page(first, reports, took)) + "\n")
    print("\n".join(_verdicts(first, reports)))


def first_token() -> dict[str, Any]:
    """Seconds from the start of a process to the first byte of its answer, not thinking; median of several starts.

    Memory is the process's most.
    """
    runs = [_chat() for _ in range(_CHATS)]
    seconds = [s for s, _ in runs]
    return {
        "seconds": median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "runs": len(runs),
        "peak_bytes": max(peak for _, peak in runs),
    }


def _chat() -> tuple[float, int]:
    command = [*FATHOM, "chat", "--effort", "none", "--max-tokens", "16"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        cwd=ROOT,
        bufsize=0,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.close()
    select.select([process.stdout], [], [])
    seconds, said = time.perf_counter() - begin, process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not said:
        sys.exit(f"fathom chat did not answer (exit code {process.returncode}): try it by hand")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_weights(folder: Path) -> Path:
    """FP4 experts and BF16 linears, random; then everything in BF16, which both sides can open."""
    stored, widened = str(folder / "stored"), str(folder / "bf16")
    making = ["--random", "--model", str(HERE / "tiny"), "--experts", "fp4", "--linears", "bf16", stored]
    for arguments in (making, [stored, widened, "--experts", "bf16", "--linears", "bf16"]):
        command = [*FATHOM, "convert", *arguments]
        subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return Path(widened)


def _shown(model: str, report: dict[str, Any]) -> dict[str, Any]:
    report = {"model": model, **report}
    print("\n".join([heading(report), "", *table(report), *remarks(report), ""]), flush=True)
    return report


def _page(first: dict[str, Any], reports: dict[str, Any], took: float) -> Iterator[str]:
    yield "# Speed on a CPU"
    yield ""
    yield f"Written by `python benchmarks/cpu.py` in {took / 60:.1f} minutes; all figures are in `cpu.json`."
    yield ""
    yield from _verdicts(first, reports)
    yield ""
    yield f"First token: {first['low']:.2f}-{first['high']:.2f} s, peak {first['peak_bytes'] / 1e6:.0f} MB."
    for name, report in reports.items():
        what, where = heading(report).split("\n")
        load = f"load before {report['load'][0]:.1f}"
        yield from ("", f"## {name}", "", f"{what}. {where}; {load}.", "", *table(report), *remarks(report))
    yield from ("", *_NOTES)


def _verdicts(first: dict[str, Any], reports: dict[str, Any]) -> Iterator[str]:
    yield "| what | measured | target | |"
    yield "|---|---|---|---|"
    rate, wait = reports["small"]["best"]["fathom"]["tokens_per_second"], first["seconds"]
    yield _verdict("embedded model, decode", f"{rate:.0f} tok/s", f">= {SMALL_TARGET:.0f}", rate >= SMALL_TARGET)
    yield _verdict("`fathom chat`, first token", f"{wait:.2f} s", f"<= {FIRST_TARGET:.0f} s", wait <= FIRST_TARGET)
    for name, target in TARGETS.items():
        ratio, best = reports[name]["ratio"], reports[name]["best"]
        rates = " against ".join(f"{best[side]['tokens_per_second']:.0f}" for side in ("fathom", "transformers"))
        measured = f"{ratio:.2f} times transformers ({rates} tok/s)"
        yield _verdict(f"118.6M, {name}", measured, f">= {target}", ratio >= target)


def _verdict(what: str, measured: str, target: str, met: bool) -> str:
    return f"| {what} | {measured} | {target} | {'met' if met else 'not met'} |"


_NOTES = (
    "## How to read this",
    "",
    "Each row of a table is a process of its own (a side and a dtype) with a number of threads; peak memory is that",
    "process's, loading included. Sides take turns in every round; each side's best row counts. Rows half as fast as",
    "their side's best in the warm-up were left out. MB read are the weights of a decode step, in the dtype they are",
    "kept in. With transformers, both sides load the same BF16 export and no activation is quantised on either; alone,",
    "the embedded model runs as in `fathom chat`, with activations quantised. A prefill computes the logits of the",
    "last token only, on both sides.",
)


def _write(name: str, text: str) -> None:
    aside = RESULTS / f".{name}"
    aside.write_text(text, encoding="utf-8")
    aside.replace(RESULTS / name)


if __name__ == "__main__":
    main()
