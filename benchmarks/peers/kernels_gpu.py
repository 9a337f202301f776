"""Single kernels of DeepGEMM and FlashMLA beside ours on one GPU, at V4-Flash's sizes: microseconds a launch.

    python benchmarks/peers/kernels_gpu.py [--only linear,attention,prompt] [--out FILE.json]

Wheels that fit torch 2.11 and CUDA 13: `pip install --no-deps sgl-deep-gemm==0.1.5 apache-tvm-ffi` and
`tokenspeed-flashmla==1.0.0.post20260615`. A figure is the median of eight replays of a CUDA graph that runs the op over
as many inputs as the L2 cache cannot hold. Ours takes BF16 and rounds it, DeepGEMM is given rounded inputs. FlashMLA's
rows are those of DeepSeek-V3.2: 576 values in 656 bytes, where ours are 512 in 584.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fathom.config import FLASH
from fathom.engine.device_cache import DeviceCache
from fathom.kernels import decode
from fathom.kernels.linear import Part, linears
from fathom.kernels.quant import WEIGHT_BLOCK, fp8_sim

GPU = torch.device("cuda")
ENOUGH = 200e6
"""Bytes of inputs in a graph, several times the L2 cache."""
LINEARS = (("wq_b TP2", 16384, 1024), ("wo_b", 4096, 8192))
ROWS = (1, 8, 32, 4096)
CHOSEN, WINDOW, HEADS = 512, 128, 64
Row = tuple[str, str, float | None, float | None]


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 8) -> float:
    """Microseconds a call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    return median(times)


def linear() -> Iterator[Row]:
    """FP8 linears in 128 x 128 blocks, the same weights on both sides; they must agree."""
    for name, n, k in LINEARS:
        count = max(2, int(ENOUGH / (n * k)))
        weights = [(torch.randn(n, k, device=GPU) * 60).clamp(-440, 440).to(torch.float8_e4m3fn) for _ in range(count)]
        scales = [torch.randint(118, 124, (n // 128, k // 128), device=GPU, dtype=torch.uint8) for _ in weights]
        both = list(zip(weights, scales, strict=True))
        parts = [Part(w, s.view(torch.float8_e8m0fnu), quantised=True) for w, s in both]
        theirs = [(w, (s.int() << 23).view(torch.float32)) for w, s in both]
        for m in ROWS:
            x = torch.randn(m, k, device=GPU).bfloat16()
            mine = graph_us([partial(linears, x, [part]) for part in parts])
            yield f"FP8 linear {name} {n}x{k}", str(m), mine, _try(partial(_gemm, x, theirs, linears(x, parts[:1])[0]))


def _gemm(x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], ours: Tensor) -> float:
    import deep_gemm

    rounded, out = _quantised(x), torch.empty_like(ours)
    calls = [partial(deep_gemm.fp8_gemm_nt, rounded, weight, out) for weight in weights]
    calls[0]()
    _agree(out, ours)
    return graph_us(calls)


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [M, K] and float32 [M, K / 128], as our quantiser rounds."""
    rounded = fp8_sim(x, WEIGHT_BLOCK).float().unflatten(-1, (-1, WEIGHT_BLOCK))
    amax = x.float().unflatten(-1, (-1, WEIGHT_BLOCK)).abs().amax(-1).clamp_min(1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    return (rounded / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scale


def _agree(theirs: Tensor, ours: Tensor) -> None:
    error = float((theirs.float() - ours.float()).norm() / ours.float().norm())
    assert error < 1e-2, f"the sides differ by {error:.1e}"


def attention() -> Iterator[Row]:
    """A decode step's attention of 64 heads over a window and 512 chosen rows."""
    import flash_mla

    pages = 64
    config = FLASH
    for batch in (1, 8, 32):
        memory = DeviceCache(config, batch, pages * batch, pages * 128, GPU).layers[2]
        memory.table.copy_(torch.randperm(pages * batch, device=GPU).view(batch, pages))
        slots = torch.arange(batch, device=GPU, dtype=torch.int32)
        freqs = torch.rand(32, device=GPU)
        tokens = decode.Tokens.at(slots, torch.full_like(slots, pages * 128 - 1), freqs, freqs)
        q, sink = torch.randn(batch, HEADS, 512, device=GPU).bfloat16(), torch.zeros(HEADS, device=GPU)
        chosen = torch.stack(
            [torch.randperm(pages * 32, device=GPU)[:CHOSEN].sort().values for _ in range(batch)]
        ).int()
        mine = [partial(decode.attend, q, sink, tokens, memory, pages * 128, chosen)] * 8
        cache = torch.zeros(pages * batch, 64, 1, 656, device=GPU, dtype=torch.uint8).view(torch.float8_e4m3fn)
        query = torch.randn(batch, 1, HEADS, 576, device=GPU).bfloat16()
        index = torch.randint(pages * 64, (batch, 1, CHOSEN + WINDOW), device=GPU, dtype=torch.int32)
        call = partial(
            flash_mla.flash_mla_with_kvcache, query, cache, None, None, 512, flash_mla.get_mla_metadata()[0],
            is_fp8_kvcache=True, indices=index,
        )  # fmt: skip
        yield (
            "decode attention, 640 rows, 64 heads",
            str(batch),
            graph_us(mine),
            _try(lambda call=call: graph_us([call] * 8)),
        )


def prompt() -> Iterator[Row]:
    """A prompt's attention of 64 heads, 1,024 queries, each over a window and 512 chosen rows of 8,192."""
    import flash_mla

    from fathom.kernels import prefill

    count, entries, start = 1024, 8192, 4 * 8192 - 1024
    rows = torch.randn(entries, 576, device=GPU).bfloat16()
    chosen = torch.stack([torch.randperm(start // 4, device=GPU)[:CHOSEN].sort().values for _ in range(count)]).int()
    q, sink = torch.randn(count, HEADS, 576, device=GPU).bfloat16(), torch.zeros(HEADS, device=GPU)
    near, turn = torch.randn(count + 127, 512, device=GPU).bfloat16(), torch.rand(count, 32, 2, device=GPU)
    own, held = q[..., :512].contiguous(), rows[:, :512].contiguous()
    mine = partial(prefill.attend, own, near, held, chosen, sink, turn, start, 4, WINDOW)
    index = torch.cat((chosen, chosen[:, :WINDOW]), 1).unsqueeze(1)
    call = partial(flash_mla.flash_mla_sparse_fwd, q, rows.unsqueeze(1), index, 576**-0.5)
    yield "prompt attention, 640 rows, 64 heads", str(count), graph_us([mine] * 4), _try(lambda: graph_us([call] * 4))


def _try(call: Callable[[], float]) -> float | None:
    """None, with the reason said, where the other side refuses."""
    try:
        return call()
    except (RuntimeError, AssertionError, TypeError) as error:
        print(f"not measured: {str(error).splitlines()[0]}", flush=True)
        return None


def main() -> None:
    """Measure, print, keep."""
    sections = {"linear": linear, "attention": attention, "prompt": prompt}
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(sections))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[Any] = []
    with torch.inference_mode():
        for name in given.only.split(","):
            for row in sections[name]():
                rows.append(row)
                print("{:40} {:>6} ours {:>9} us, theirs {:>9} us".format(*row[:2], *map(_shown, row[2:])), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _shown(us: float | None) -> str:
    return "-" if us is None else f"{us:.2f}"


if __name__ == "__main__":
    main()
