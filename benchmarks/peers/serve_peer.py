"""The embedded model behind `transformers serve` and behind `fathom serve`, the same questions, in turns.

`python benchmarks/peers/serve_peer.py`, about four minutes on two cores. transformers needs accelerate; it gets our
BF16 export and a chat template that writes the same prompt, and has no activation quantisers.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from fathom.cli.bench_run import ROOT, machine
from fathom.config import WEIGHTS
from fathom.skills.mix import held_out

RESULTS = Path(__file__).parents[1] / "results"
STREAMS, ROUNDS, PORTS = (1, 8), 3, {"fathom": 8471, "transformers": 8472}
TEMPLATE = (
    "<｜begin▁of▁sentence｜>{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}<｜Assistant｜><think>"
)


def export(folder: Path) -> Path:
    """Everything in BF16, with the template beside it."""
    out = folder / "bf16"
    command = [sys.executable, "-m", "fathom.cli.main", "convert", str(WEIGHTS / "small"), str(out)]
    subprocess.run(
        [*command, "--experts", "bf16", "--linears", "bf16"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": TEMPLATE, "eos_token": "<｜end▁of▁sentence｜>"}
    path.write_text(json.dumps(settings))
    return out


def start(side: str, folder: Path, database: Path) -> subprocess.Popen[bytes]:
    """A server as its users start it."""
    port = str(PORTS[side])
    if side == "fathom":
        url = f"sqlite:///{database}/ledger.db"
        command = [sys.executable, "-m", "fathom.cli.main", "serve", "--port", port, "--database", url]
    else:
        program = str(Path(sys.executable).with_name("transformers"))
        command = [program, "serve", str(folder), "--port", port, "--device", "cpu", "--dtype", "float32"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def ask(client: httpx.AsyncClient, model: str, seed: int) -> tuple[float, int]:
    """Seconds to the first piece, and pieces: each is one token."""
    question = held_out("arithmetic", 3, 1, seed)[0].question
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "max_tokens": 64,
        "temperature": 0,
    }
    begun, first, pieces = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", ()):
                delta = choice["delta"]
                if delta.get("content") or delta.get("reasoning_content"):
                    first, pieces = first or time.perf_counter() - begun, pieces + 1
    return first, pieces


async def crowd(client: httpx.AsyncClient, model: str, streams: int, seed: int) -> dict[str, float]:
    """So many streams, two questions each."""

    async def one(n: int) -> list[tuple[float, int]]:
        return [await ask(client, model, 1000 * seed + 10 * n + k) for k in range(2)]

    begun = time.perf_counter()
    answers = [a for some in await asyncio.gather(*(one(n) for n in range(streams))) for a in some]
    seconds = time.perf_counter() - begun
    return {"first": median(a[0] for a in answers), "rate": sum(a[1] for a in answers) / seconds}


async def measure(folder: Path) -> dict[str, Any]:
    """Both sides, in turns."""
    exported = export(folder)
    running = {side: start(side, exported, folder) for side in PORTS}
    names = {"fathom": "small", "transformers": str(exported)}
    clients = {s: httpx.AsyncClient(base_url=f"http://127.0.0.1:{p}", timeout=300) for s, p in PORTS.items()}
    try:
        for side, client in clients.items():
            await ready(client)
            await ask(client, names[side], 1)
        found: dict[str, Any] = {}
        for streams in STREAMS:
            runs = {side: [] for side in PORTS}
            for n in range(ROUNDS):
                for side, client in clients.items():
                    runs[side].append(await crowd(client, names[side], streams, n))
            found[str(streams)] = {s: sorted(r, key=lambda x: x["rate"])[ROUNDS // 2] for s, r in runs.items()}
            print(streams, json.dumps(found[str(streams)]), flush=True)
        return found
    finally:
        for process in running.values():
            process.terminate()


async def ready(client: httpx.AsyncClient) -> None:
    """Wait until it answers."""
    for _ in range(600):
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)
    sys.exit(f"{client.base_url} did not start")


def main() -> None:
    """Measure, print, and keep."""
    with TemporaryDirectory() as temporary:
        found = asyncio.run(measure(Path(temporary)))
    where = machine()
    lines = ["# The same questions to `transformers serve`", "", "`python benchmarks/peers/serve_peer.py`"]
    lines += [f"at commit {where['commit']}; {where['cpu']}, {where['cores']} cores.", ""]
    lines += [f"Median of {ROUNDS} rounds, sides in turns.", ""]
    lines += ["| streams | fathom, tokens/s | transformers, tokens/s | times | first token, fathom | transformers |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: |"]
    for streams, sides in found.items():
        ours, theirs = sides["fathom"], sides["transformers"]
        times = ours["rate"] / theirs["rate"]
        waits = f"{ours['first']:.2f} s | {theirs['first']:.2f} s"
        lines.append(f"| {streams} | {ours['rate']:.0f} | {theirs['rate']:.0f} | {times:.1f} | {waits} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "serve_peer.json").write_text(json.dumps({**where, **found}, indent=1) + "\n")
    (RESULTS / "serve_peer.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
