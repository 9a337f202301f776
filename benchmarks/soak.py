"""What results/soak.md says, measured again: `python benchmarks/soak.py`, 30 minutes on two quiet cores.

A real `fathom serve` with keys, an SQLite ledger and a cache on disk; many clients that stream in four dialects, share
beginnings, continue conversations, and leave early. Each writes down what it was told that it used. At the end every
row of the ledger is laid beside what its client saw.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soak_client import Ask, Seen, ask

from fathom.cli.bench_run import ROOT, machine
from fathom.server.database import open_database
from fathom.server.keys import Keyring, Limits
from fathom.server.metering import Row, read_rows
from fathom.skills.mix import SKILLS, held_out

RESULTS = Path(__file__).parent / "results"
EVERY = 10.0
KEYS = 8
NARROW = 6
"""Requests at once that the last key may have: fewer than its clients, so that some are refused."""

BEGINNINGS = (20, 60, 80, 150, 250, 500, 1000)
"""Digits of each shared beginning: about twice as many tokens."""

FLAGS = ("--kv-gb", "0.25", "--kv-host-gb", "0.1", "--kv-disk-gb", "0.5", "--max-seqs", "64")
"""Small tiers, so that they are full within minutes and memory must then be flat."""


@dataclass
class Server:
    """`fathom serve` as a process."""

    folder: Path
    errors: Path
    samples: list[tuple[float, float, int]] = field(default_factory=list)
    """Seconds from the start, resident MB, open files."""

    def start(self, *flags: str) -> None:
        """Start it and wait for the line with its address."""
        command = [sys.executable, "-m", "fathom.cli.main", "serve", "--port", "0", "--database", self.database]
        disk = ["--kv-disk-dir", str(self.folder / "cache")]
        with self.errors.open("wb") as stderr:
            self._process = subprocess.Popen([*command, *disk, *flags], cwd=ROOT, stderr=stderr)
        while not (said := self.errors.read_text()).startswith("Fathom serves"):
            if self._process.poll() is not None:
                sys.exit(f"the server did not start: {said}")
            time.sleep(0.1)
        self.port = int(said.split("http://127.0.0.1:")[1].split()[0])

    @property
    def database(self) -> str:
        """Where keys and ledger are."""
        return f"sqlite:///{self.folder}/fathom.db"

    async def watch(self) -> None:
        """Note its memory and its files every ten seconds."""
        begun = time.monotonic()
        while True:
            place = Path(f"/proc/{self._process.pid}")
            resident = next(line for line in (place / "status").read_text().splitlines() if line.startswith("VmRSS"))
            files = len(list((place / "fd").iterdir()))
            self.samples.append((time.monotonic() - begun, int(resident.split()[1]) / 1024, files))
            await asyncio.sleep(EVERY)

    def stop(self) -> int:
        """End it as a system does."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(120)


# --- what clients ask


class Client:
    """One of many: asks, waits for the end or leaves, and asks again."""

    def __init__(self, number: int, key: str, port: int) -> None:
        self._rng = random.Random(number)
        self._key, self._port = key, port
        self._turns: list[dict[str, Any]] = []
        self.seen: list[Seen] = []

    async def run(self, until: float) -> None:
        """Until that moment; what runs then is finished."""
        while time.monotonic() < until:
            asked = self._draw()
            self.seen.append(seen := await ask(self._port, self._key, asked))
            if seen.status == 429:
                await asyncio.sleep(float(seen.retry_after))
            self._remember(asked, seen)

    def _draw(self) -> Ask:
        rng = self._rng
        protocol = rng.choices(("chat", "messages", "responses", "completions"), (5, 3, 2, 1))[0]
        leaving = rng.choices(("", "half", "gone"), (17, 2, 1))[0]
        after = rng.randint(0, 12)
        effort = "none" if leaving == "half" else rng.choice(("none", "high", "max"))
        if not self._turns or len(self._turns) > 8 or rng.random() < 0.6:
            self._turns = [{"role": "system", "content": beginning(rng.randrange(len(BEGINNINGS)))}]
        skill, level = rng.choice(sorted(SKILLS)), rng.randint(1, 3)
        question = held_out(skill, level, 1, rng.randrange(10**6))[0].question
        self._turns.append({"role": "user", "content": question})
        most = rng.choice((1, 16, 60, 200))
        return Ask("chat" if leaving == "half" else protocol, tuple(self._turns), effort, most, leaving, after)

    def _remember(self, asked: Ask, seen: Seen) -> None:
        if seen.finish and seen.text and asked.protocol != "completions":
            self._turns.append({"role": "assistant", "content": seen.text})
        else:
            self._turns = []


def beginning(n: int) -> str:
    """Instructions that many clients share: from some 40 to 2,000 tokens."""
    rng = random.Random(n)
    return f"Rule {n}: " + ",".join(str(rng.randrange(10)) for _ in range(BEGINNINGS[n]))


# --- the run


async def run(minutes: float, clients: int, folder: Path) -> dict[str, Any]:
    """All of it; the report."""
    where, server = machine(), Server(folder, folder / "stderr")
    ring = Keyring(open_database(server.database))
    limits = [Limits()] * (KEYS - 1) + [Limits(concurrency=NARROW)]
    keys = [ring.create(f"client {n}", limits[n]) for n in range(KEYS)]
    server.start(*FLAGS)
    watch = asyncio.create_task(server.watch())
    many = [Client(n, keys[n % KEYS][1], server.port) for n in range(clients)]
    begun = time.monotonic()
    await asyncio.gather(*(client.run(begun + 60 * minutes) for client in many))
    seconds = time.monotonic() - begun
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    code = server.stop()
    rows = list(read_rows(open_database(server.database)))
    owners = {id: n for n, (key, _) in enumerate(keys) for id in [key.id]}
    report = {**where, "minutes": minutes, "clients": clients, "seconds": seconds, "exit": code}
    report |= compared([(n % KEYS, seen) for n, c in enumerate(many) for seen in c.seen], rows, owners)
    report |= memory(server.samples)
    return report | {"stderr": server.errors.read_text().splitlines()[16:][:20]}


def compared(seen: Sequence[tuple[int, Seen]], rows: Sequence[Row], owners: dict[str, int]) -> dict[str, Any]:
    """The ledger beside what the clients saw, row by row where a client learned its request's id."""
    by_id = {row.id: row for row in rows}
    served = [(key, s) for key, s in seen if s.status == 200]
    whole = [(key, s) for key, s in served if s.finish]
    left = [s for _, s in served if not s.finish and s.leaving]
    named = {s.id for _, s in served if s.id}
    wrong = [s.id for key, s in whole if not _same(by_id.get(s.id), s, key, owners)]
    return {
        "requests": len(seen),
        "served": len(served),
        "refused": dict(Counter(str(s.status) for _, s in seen if s.status != 200)),
        "rows": len(rows),
        "rows_twice": len(rows) - len(by_id),
        "rows_lost": len(named - set(by_id)),
        "rows_of_unnamed": len(set(by_id) - named),
        "unnamed": sum(not s.id for _, s in served),
        "finished": len(whole),
        "differing": len(wrong),
        "examples": wrong[:5],
        "sums": {
            "clients": _sums([s for _, s in whole]),
            "ledger": _sums([by_id[s.id] for _, s in whole if s.id in by_id]),
        },
        "finishes": dict(Counter(row.finish for row in rows)),
        "protocols": dict(Counter(row.protocol for row in rows)),
        "amount": str(sum(row.amount for row in rows)),
        "errors": dict(Counter(s.error for _, s in seen if s.error)),
        "left": _left([s for s in left if s.leaving == "half"], by_id),
        "gone": _left([s for s in left if s.leaving == "gone"], by_id),
    }  # fmt: skip


def _sums(items: Sequence[Seen] | Sequence[Row]) -> list[int]:
    return [sum(getattr(item, name) for item in items) for name in ("hit", "miss", "output")]


def _same(row: Row | None, seen: Seen, key: int, owners: dict[str, int]) -> bool:
    told = (seen.protocol, seen.hit, seen.miss, seen.output)
    return row is not None and (row.protocol, row.hit, row.miss, row.output) == told and owners[row.key or ""] == key


def _left(seen: Sequence[Seen], by_id: dict[str, Row]) -> dict[str, Any]:
    """Of those who left early: tokens that they received, counted by their log probabilities, and those billed."""
    known = [(s, by_id[s.id]) for s in seen if s.id in by_id]
    more = Counter(row.output - s.tokens for s, row in known)
    return {
        "requests": len(seen),
        "received": sum(s.tokens for s, _ in known),
        "billed": sum(row.output for _, row in known),
        "billed_minus_received": {str(n): more[n] for n in sorted(more)},
    }


def memory(samples: Sequence[tuple[float, float, int]]) -> dict[str, Any]:
    """The resident memory: at each fifth of the run, and its slope over the second half."""
    half = samples[len(samples) // 2 :]
    shown = [samples[round(i * (len(samples) - 1) / 10)] for i in range(11)]
    return {
        "rss": [{"minute": round(s / 60, 1), "mb": round(mb), "files": files} for s, mb, files in shown],
        "rss_most": round(max(mb for _, mb, _ in samples)),
        "rss_slope_mb_per_hour": round(3600 * _slope([s for s, _, _ in half], [mb for _, mb, _ in half]), 1),
        "samples": len(samples),
    }


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    square = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / square if square else 0.0


# --- the page


def page(r: dict[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    yield "# Half an hour of 64 streams on two cores" if r["minutes"] == 30 else f"# {r['minutes']} minutes of streams"
    yield ""
    yield (
        f"`python benchmarks/soak.py --minutes {r['minutes']:g} --clients {r['clients']}` at commit {r['commit']}; "
        f"{r['cpu']}, {r['cores']} cores, which the clients share. Server: `fathom serve {' '.join(FLAGS)}`, keys, "
        "SQLite, a cache on disk."
    )
    yield ""
    yield "| what | measured |"
    yield "| --- | --- |"
    for what, measured in _rows(r):
        yield f"| {what} | {measured} |"
    yield ""
    yield "| minute | resident MB | open files |"
    yield "| ---: | ---: | ---: |"
    for s in r["rss"]:
        yield f"| {s['minute']} | {s['mb']} | {s['files']} |"


def _rows(r: dict[str, Any]) -> Iterator[tuple[str, str]]:
    sums, tokens = r["sums"], r["sums"]["clients"][2] + r["left"]["billed"] + r["gone"]["billed"]
    yield "requests sent", f"{r['requests']:,} in {r['seconds'] / 60:.1f} minutes, {tokens / r['seconds']:.0f} tokens/s"
    yield "refused at the door (status: how many)", _pairs(r["refused"])
    yield "requests taken, rows of the ledger", f"{r['served']:,}, {r['rows']:,}"
    yield "rows lost, rows twice", f"{r['rows_lost']}, {r['rows_twice']}"
    yield "by protocol", _pairs(r["protocols"])
    yield "by end", _pairs(r["finishes"])
    yield "finished: requests whose row differs from what the client saw", f"{r['differing']} of {r['finished']:,}"
    for name, n in (("hit", 0), ("miss", 1), ("output", 2)):
        yield f"{name} tokens: clients, ledger", f"{sums['clients'][n]:,}, {sums['ledger'][n]:,}"
    half, gone = r["left"], r["gone"]
    yield (
        "left, but read what came: requests; tokens received, billed",
        f"{half['requests']:,}; {half['received']:,}, {half['billed']:,}",
    )
    yield "billed minus received: requests", _pairs(half["billed_minus_received"])
    yield "cut the line: requests; tokens billed", f"{gone['requests']:,}; {gone['billed']:,}"
    yield "left before the first event: requests, rows", f"{r['unnamed']}, {r['rows_of_unnamed']}"
    yield "errors that clients saw", _pairs(r["errors"])
    yield (
        "resident memory, most; slope of the second half",
        f"{r['rss_most']} MB; {r['rss_slope_mb_per_hour']} MB an hour",
    )
    yield "exit code after SIGTERM; lines on stderr after the start", f"{r['exit']}; {len(r['stderr'])}"


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {n:,}" for name, n in counts.items()) or "none"


def main() -> None:
    """Measure, and write results/soak.json and results/soak.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--dry", action="store_true", help="print only")
    flags = parser.parse_args()
    with TemporaryDirectory() as folder:
        report = asyncio.run(run(flags.minutes, flags.clients, Path(folder)))
    texts = {"soak.json": json.dumps(report, indent=1), "soak.md": "\n".join(page(report))}
    for name, text in texts.items() if not flags.dry else ():
        (aside := RESULTS / f".{name}").write_text(text + "\n", encoding="utf-8")
        aside.replace(RESULTS / name)
    print(texts["soak.json"] + "\n\n" + texts["soak.md"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
