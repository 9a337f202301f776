"""What results/serve.md says, measured again: `python benchmarks/serve.py`, about ten minutes on two quiet cores.

A server with the embedded model is started as a user would start it, and asked over HTTP. All requests stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from fathom.accounting import kv_bytes_per_token
from fathom.cli.bench_run import ROOT, machine
from fathom.config import WEIGHTS, ModelConfig
from fathom.skills.mix import held_out

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STREAMS = (1, 8, 32, 64)
RUNS = 3
TILE = 128


@dataclass
class Answer:
    """One streamed answer: when its tokens came (seconds from the request), its text and its usage."""

    begun: float
    moments: list[float] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": ""})
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.moments[0] - self.begun

    @property
    def gap(self) -> float:
        """The longest wait between two tokens."""
        return max((b - a for a, b in zip(self.moments, self.moments[1:], strict=False)), default=0.0)

    @property
    def hit(self) -> int:
        """Prompt tokens that were in the cache."""
        return int(self.usage["prompt_cache_hit_tokens"])


class Server:
    """`fathom serve` as a process, and a client of it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "fathom.cli.main", "serve", "--port", str(port), "--kv-disk-dir", str(folder)]
        self._process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=600, limits=httpx.Limits(max_connections=None)
        )

    async def ready(self) -> None:
        """Wait until it answers."""
        for _ in range(600):
            if self._process.poll() is not None:
                assert self._process.stderr is not None
                sys.exit(f"the server did not start: {self._process.stderr.read().decode()}")
            try:
                if (await self.client.get("/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.1)
        sys.exit("the server was not ready within a minute")

    async def ask(self, messages: Sequence[dict[str, Any]], **body: Any) -> Answer:
        """One streamed answer."""
        answer = Answer(time.perf_counter())
        request = {
            "model": "small",
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
        }
        async with self.client.stream("POST", "/v1/chat/completions", json=request) as response:
            if response.status_code != 200:
                sys.exit(f"the server refused: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(answer, json.loads(line[6:]))
        return answer

    async def stop(self) -> None:
        """End it as Ctrl-C does."""
        await self.client.aclose()
        self._process.terminate()
        await asyncio.to_thread(self._process.wait, 60)


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if any(delta.get(part) for part in ("content", "reasoning_content", "tool_calls")):
            answer.moments.append(time.perf_counter())
            answer.message["content"] += delta.get("content") or ""


@asynccontextmanager
async def server(folder: Path, *flags: str) -> AsyncIterator[Server]:
    """A server, ready, and ended afterwards."""
    made = Server(folder, *flags)
    await made.ready()
    try:
        yield made
    finally:
        await made.stop()


# --- the measurements


async def throughput(site: Server) -> dict[str, Any]:
    """Many streams at once, each asking one question after the other: time to the first token, tokens a second."""
    await asyncio.gather(*(_streamer(site, n, 1) for n in range(4)))
    return {str(n): _best([await _at_once(site, n, run) for run in range(RUNS)]) for n in STREAMS}


async def _at_once(site: Server, streams: int, run: int) -> dict[str, float]:
    begun = time.perf_counter()
    answers = await asyncio.gather(*(_streamer(site, 1000 * run + n, 4) for n in range(streams)))
    seconds, flat = time.perf_counter() - begun, [a for some in answers for a in some]
    tokens = sum(a.usage["completion_tokens"] for a in flat)
    return {"first": median(a.first for a in flat), "rate": tokens / seconds, "tokens": tokens}


async def _streamer(site: Server, seed: int, questions: int) -> list[Answer]:
    """Questions of the skills at effort max: answers of about sixty tokens."""
    asked = (_question(100 * seed + n) for n in range(questions))
    return [await site.ask([user(q)], reasoning_effort="max", temperature=0) for q in asked]


def _question(seed: int) -> str:
    return held_out("arithmetic", 3, 1, seed)[0].question


def _best(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return sorted(runs, key=lambda run: run["rate"])[len(runs) // 2]


async def prefix(folder: Path) -> dict[str, Any]:
    """The first token after 8K tokens: cold, with its prefix in memory, and from disk after a restart."""
    cold, warm, disk = [], [], []
    for run in range(RUNS):
        text = _long(8000, seed=run)
        async with server(folder) as site:
            cold.append(await site.ask([user(text)], max_tokens=2))
            warm.append(await site.ask([user(text)], max_tokens=2))
            await asyncio.sleep(2)  # the disk writer is a thread of its own
        async with server(folder) as site:
            disk.append(await site.ask([user(text)], max_tokens=2))
    shown = {"cold": cold, "memory": warm, "disk": disk}
    seconds = {name: median(a.first for a in answers) for name, answers in shown.items()}
    return {"prompt": cold[0].usage["prompt_tokens"], "hit": warm[0].hit, "hit_disk": disk[0].hit, **seconds}


async def agent(site: Server) -> dict[str, Any]:
    """An agent's day: it appends turns with tools, branches, edits in the middle, and sends sub-agents off.

    Reusable is what the prompt shares with any earlier prompt, in whole tiles of 128 tokens. An answer that comes back
    in the next prompt is reused as well and not counted here, so more than all of it may be reused.
    """
    trace = _Trace(site)
    main = [system(_long(1500, seed=50)), user(_long(300, seed=51))]
    for step in range(8):
        main += [(await trace.ask(main)).message, user(f"Step {step}: {_long(150, seed=60 + step)}")]
    for branch in range(4):
        await trace.ask([*main[:6], user(f"Instead: {_long(100, seed=80 + branch)}")])
    edited = [*main[:4], user(_long(120, seed=90)), *main[5:]]
    await trace.ask(edited)
    await trace.ask([*edited, user("Go on.")])
    await asyncio.gather(*(trace.ask([*main[:2], user(f"Sub-agent {n}: {_long(90, seed=95 + n)}")]) for n in range(4)))
    await trace.ask([*main, user("And now?")])
    return {"requests": len(trace.seen), "prompt": trace.prompt, "reusable": trace.reusable, "reused": trace.reused}


class _Trace:
    """What was asked so far, and how much of each prompt the server could have known."""

    def __init__(self, site: Server) -> None:
        from fathom.encoding.codec import Codec

        self.site, self.codec = site, Codec.load(WEIGHTS / "small")
        self.seen: list[list[int]] = []
        self.prompt = self.reusable = self.reused = 0

    async def ask(self, messages: list[dict[str, Any]]) -> Answer:
        """One turn with a tool, so that earlier turns stay in the prompt as they were."""
        from fathom.api import ChatRequest

        ids = self.codec.prompt(ChatRequest(messages=messages, tools=[TOOL], effort="high"))
        known = max((_shared(ids[:-1], old) for old in self.seen), default=0)
        self.seen.append(ids)
        answer = await self.site.ask(messages, tools=[TOOL], max_tokens=24, temperature=0)
        self.prompt += len(ids)
        self.reusable += known - known % TILE
        self.reused += answer.hit
        return answer


TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


async def gap(site: Server) -> dict[str, Any]:
    """The longest wait of eight running streams while a prompt of 32K tokens is computed."""
    quiet = await asyncio.gather(*(_streamer(site, 7000 + n, 6) for n in range(8)))
    long = asyncio.create_task(site.ask([user(_long(32_000, seed=7))], max_tokens=2))
    busy: list[Answer] = []
    while not long.done():
        busy += [
            a
            for some in await asyncio.gather(*(_streamer(site, 8000 + len(busy) + n, 1) for n in range(8)))
            for a in some
        ]
    answer = await long
    return {
        "quiet": max(a.gap for some in quiet for a in some),
        "busy": max(a.gap for a in busy),
        "answers": len(busy),
        "long_prompt": answer.usage["prompt_tokens"],
        "long_first": answer.first,
    }


def disk_bytes(folder: Path) -> dict[str, Any]:
    """Bytes a token of the blocks on disk against accounting, and of a state: the smaller and the larger files."""
    sizes = [f.stat().st_size for f in (folder / "kv").rglob("*") if f.is_file()]
    blocks, states = ([s for s in sizes if s == size] for size in (min(sizes), max(sizes)))
    return {
        "blocks": len(blocks),
        "states": len(states),
        "block_per_token": blocks[0] / TILE,
        "accounting_per_token": kv_bytes_per_token(ModelConfig.load(WEIGHTS / "small")),
        "state": states[0],
    }


def user(text: str) -> dict[str, Any]:
    """A question."""
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    """Instructions."""
    return {"role": "system", "content": text}


def _long(tokens: int, seed: int) -> str:
    """Text of about so many tokens: each digit is one, as is each comma."""
    rng = random.Random(seed)
    return ",".join(str(rng.randrange(10)) for _ in range(tokens // 2))


# --- the page


async def run() -> dict[str, Any]:
    """All of it."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report: dict[str, Any] = {**machine()}
        async with server(folder / "a") as site:
            report["streams"] = _said(await throughput(site))
        report["prefix"] = _said(await prefix(folder / "b"))
        report["disk"] = _said(disk_bytes(folder / "b"))
        async with server(folder / "c") as site:
            report["agent"] = _said(await agent(site))
        async with server(folder / "d") as site:
            report["gap"] = _said(await gap(site))
    return report


def _said(part: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(part), flush=True)
    return part


def page(report: dict[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    yield "# Serving the embedded model on two cores"
    yield ""
    yield f"`python benchmarks/serve.py` at commit {report['commit']}; {report['cpu']}, {report['cores']} cores."
    yield ""
    yield "| streams | first token, median | tokens/s in all | of one stream |"
    yield "| ---: | ---: | ---: | ---: |"
    one = report["streams"]["1"]["rate"]
    for n, row in report["streams"].items():
        yield f"| {n} | {row['first']:.2f} s | {row['rate']:.0f} | {row['rate'] / one:.1f} x |"
    yield ""
    yield "| what | measured | target |"
    yield "| --- | ---: | ---: |"
    for what, measured, target in _rows(report):
        yield f"| {what} | {measured} | {target} |"


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    p, a, g, d = (report[k] for k in ("prefix", "agent", "gap", "disk"))
    cold = p["cold"]
    yield f"first token after {p['prompt']:,} tokens, cold", f"{cold:.2f} s", ""
    for name, hit, where in (("memory", "hit", "in memory"), ("disk", "hit_disk", "on disk, after a restart")):
        yield f"with the prefix {where} ({p[hit]:,} reused)", f"{p[name]:.3f} s, 1/{cold / p[name]:.0f}", "1/10"
    share = 100 * a["reused"] / a["reusable"]
    yield f"agent trace, {a['requests']} requests: reused of reusable tokens", f"{share:.1f} %", ">= 99 %"
    yield "longest gap of 8 streams, quiet", f"{g['quiet']:.2f} s", ""
    yield f"the same while {g['long_prompt']:,} tokens are prefilled", f"{g['busy']:.2f} s", "bounded"
    wanted = d["accounting_per_token"]
    yield f"disk, bytes a token of blocks (accounting: {wanted:.1f})", f"{d['block_per_token']:.1f}", "within 10 %"
    yield "disk, bytes of a state", f"{d['state']:,.0f}", ""


def main() -> None:
    """Measure, and write results/serve.json and results/serve.md."""
    report = asyncio.run(run())
    RESULTS.mkdir(exist_ok=True)
    for name, text in (("serve.json", json.dumps(report, indent=1)), ("serve.md", "\n".join(page(report)))):
        aside = RESULTS / f".{name}"
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(RESULTS / name)
    print("\n".join(page(report)))


if __name__ == "__main__":
    main()
