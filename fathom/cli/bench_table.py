"""The reports of `fathom bench` on a GPU in words: tables of what was measured beside what the hardware allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fathom.cli.bench_floor import COPY_RATE

Row = dict[str, Any]
_LAUNCHES = 24
"""Kernels of a breakdown that are listed; the others are summed up."""


def lines(report: Row) -> Iterator[str]:
    """A whole report."""
    yield from heading(report)
    yield ""
    yield from grid(*rows_of(report))
    yield ""
    yield from remarks(report)
    if report.get("launches"):
        yield ""
        yield from breakdown(report["launches"])


def heading(r: Row) -> Iterator[str]:
    """What was measured, where, and of which commit."""
    rank = f", {r['ranks']} ranks" if r["together"] else f", one rank of {r['ranks']}" if r["ranks"] > 1 else ""
    weights = " of random weights" if r["synthetic"] else ""
    made = f", a cache for {r['max_context']} tokens" if r.get("max_context") else ""
    yield f"{r['mode']} of {r['model']}{weights}{rank}, {r['layers']} layers, index keys {r['keys'].upper()}{made}"
    versions = f"torch {r['torch']}, CUDA {r['cuda']}, Triton {r['triton']}"
    yield f"{r['device']}, {versions}, commit {r['commit']}"


def rows_of(report: Row) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The head and the cells of a report's table."""
    head, cells = _TABLES["peer" if report.get("peer") else report["mode"]]
    return head, [cells(row) for row in report["rows"]]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, columns in line."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    yield table[0]
    yield "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    yield from table[1:]


def remarks(r: Row) -> Iterator[str]:
    """How to read the table, and figures that are not in it."""
    if r.get("peer"):
        yield f"Theirs: transformers {r['peer_version']}, eager, the same weights in BF16. Wall-clock, token to token."
        yield f"{r['experts']} experts a layer; cosine: of the logits after the prompt."
        return
    yield f"Weights {r['weights_bytes'] / 1e9:.2f} GB, in place after {r['weights_seconds']:.1f} s."
    if r["together"]:
        yield "Sums over the ranks are run, within the measured time, logits are not gathered; floors are one rank's."
    elif r["ranks"] > 1:
        yield "Sums over the ranks are counted by measured rates, not run: + sums."
    for row in r["rows"]:
        yield from _of_decode(row) if r["mode"] == "decode" else _of_prefill(row)


def _of_decode(row: Row) -> Iterator[str]:
    gigabytes, counted, other = (row[name] / 1e9 for name in ("kv_bytes", "kv_counted", "kv_of_v32"))
    where = f"{row['context']} tokens x {row['batch']}"
    yield (
        f"{where}: KV {gigabytes:.3f} GB a sequence as allocated, {counted:.3f} by accounting; "
        f"V3.2 would take {other:.2f}, {other / gigabytes:.1f} times as much."
    )
    if row["experts"] is not None:
        own, rate = 1e3 * row["own_floor_seconds"], row["bytes_per_second"]
        chose = f"tokens chose {row['experts']:.1f} experts a layer: floor {own:.2f} ms"
        yield f"{where}: {chose}, {rate / 1e12:.2f} TB/s, {100 * rate / COPY_RATE:.0f} % of a copy's."
    if not row.get("kinds"):
        yield f"{where}: timed at the last position alone, whose token closes a block of 128: one of 128 does."
    elif len(row["kinds"]) > 1:
        each = ", ".join(f"{kind['often']} of {1e3 * kind['seconds']:.3f} ms" for kind in row["kinds"])
        yield f"{where}: of 128 tokens {each}: those that close no block, one of 4, one of 128 too."
    yield f"{where}: {row['ready_seconds']:.1f} s from weights in place to the first token, its graph captured."


def _of_prefill(row: Row) -> Iterator[str]:
    if row["chunks"]:
        yield f"{row['context']} tokens: from {len(row['chunks'])} chunks at evenly spaced depths, not the whole of it."
    if row["index_share"] < 1:
        yield f"{row['context']} tokens: the rank scores {row['index_share']:.0%} of the index queries."


def breakdown(launches: Sequence[Row]) -> Iterator[str]:
    """Where a step's time goes: a launch's own time when nothing overlaps, and what it adds where launches do."""
    total, count = sum(row["seconds"] for row in launches), sum(row["count"] for row in launches)
    yield f"Launches of a step: {count}; alone, each begun after the one before, {1e3 * total:.2f} ms"
    rest = launches[_LAUNCHES:]
    shown = [*launches[:_LAUNCHES]]
    if rest:
        sums = {name: sum(row.get(name) or 0 for row in rest) for name in ("count", "seconds", "added")}
        shown.append({"kernel": f"{len(rest)} others", **sums})
    cells = [
        (r["kernel"][:60], str(r["count"]), f"{1e6 * r['seconds'] / r['count']:.1f}", f"{1e6 * r['seconds']:.0f}",
         *_added(r)) for r in shown
    ]  # fmt: skip
    yield from grid(("kernel", "launches", "µs alone", "in all", "µs added", "in all"), cells)


def _added(row: Row) -> tuple[str, str]:
    if row.get("added") is None:
        return "", ""
    return f"{1e6 * row['added'] / row['count']:.1f}", f"{1e6 * row['added']:.0f}"


def _decode(row: Row) -> Sequence[str]:
    return (
        str(row["context"]),
        str(row["batch"]),
        *_middle(row, 3),
        f"{1e3 * row['all_reduce_seconds']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['tokens_per_second_with_sums']:.0f}",
        *_floor(row, 1e3, 2),
    )


def _prefill(row: Row) -> Sequence[str]:
    return (
        str(row["context"]),
        str(row["chunk"]),
        f"{row['seconds']:.2f}",
        f"{row['low']:.2f}-{row['high']:.2f}",
        f"{row['all_reduce_seconds']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['tokens_per_second_with_sums']:.0f}",
        *_floor(row, 1, 2),
    )


def _peer(row: Row) -> Sequence[str]:
    theirs = (f"{1e3 * row[name]:.2f}" for name in ("peer_seconds", "peer_low", "peer_high"))
    middle, low, high = theirs
    numbers = (f"{row['ratio']:.1f}", f"{row['agreement']:.4f}")
    return (str(row["context"]), *_middle(row, 2), middle, f"{low}-{high}", *numbers)


def _middle(row: Row, digits: int) -> tuple[str, str]:
    middle, low, high = (f"{1e3 * row[name]:.{digits}f}" for name in ("seconds", "low", "high"))
    return middle, f"{low}-{high}"


def _floor(row: Row, unit: float, digits: int) -> tuple[str, str]:
    return f"{unit * row['floor_seconds']:.{digits}f}", f"{row['seconds'] / row['floor_seconds']:.2f}"


_TABLES: dict[str, tuple[Sequence[str], Callable[[Row], Sequence[str]]]] = {
    "decode": (
        ("context", "batch", "ms", "lowest-highest", "+ sums ms", "tok/s", "with sums", "floor ms", "x floor"),
        _decode,
    ),
    "prefill": (
        ("tokens", "chunk", "s", "lowest-highest", "+ sums s", "tok/s", "with sums", "floor s", "x floor"),
        _prefill,
    ),
    "peer": (("context", "ms", "lowest-highest", "theirs ms", "lowest-highest", "times", "cosine"), _peer),
}
