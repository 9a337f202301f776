"""Each kernel alone at V4-Flash's sizes on a GPU: microseconds a launch beside the floor of its bytes and products.

    python benchmarks/kernels.py [--only small,linear,experts,prefill] [--json FILE] [--markdown FILE]

Weights are random; their shapes and bytes are the model's. A figure is the median of eight replays of a CUDA graph that
runs the op once over each of many weight sets, more than the L2 cache holds. The floor is what the op must read and
write at 4.3 TB/s, the H200's measured copy rate, or, where that takes longer, what it must multiply at the rate of
large products (736 TFLOP/s BF16, 1367 FP8). TP2 is one rank of two: half of the heads and of the experts' width.
The tests of a kernel say that it is right: run `pytest -m gpu tests/kernels` first.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fathom.kernels import experts_many_triton as fp4_many
from fathom.kernels import experts_triton as fp4
from fathom.kernels import linear_triton as dense
from fathom.kernels import prefill, prefill_index_triton, prefill_read_triton, prefill_triton
from fathom.kernels import streams_cuda as streams
from fathom.kernels.experts_pairs_triton import Fp4Experts
from fathom.kernels.experts_plan_triton import by_slot, planned
from fathom.kernels.norm_triton import rms_norm
from fathom.kernels.quant import fp4_sim
from fathom.kernels.quant_triton import fp8_sim, gated, quantise
from fathom.kernels.router_triton import route
from fathom.kernels.stored import Keys, Rows

RATE = 4.3e6
"""Bytes a microsecond that an H200 copies."""
BF16_RATE, FP8_RATE = 736e6, 1367e6
"""Operations a microsecond of large products."""
ENOUGH = 400e6
"""Bytes of weights in a graph, several times the L2 cache."""
GPU = "cuda"
HIDDEN, EXPERTS, TOPK, STREAMS = 4096, 256, 6, 4
LIMIT, EPS = 10.0, 1e-6

Row = dict[str, str | float]
rows: list[Row] = []


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 8) -> float:
    """Microseconds a call: the calls one after the other in one CUDA graph, median of the replays."""
    for call in calls[:2]:
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
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def report(
    op: str, shape: str, tokens: int, calls: Sequence[Callable[[], object]], size: float, products: float = 0.0
) -> None:
    """One line of the table; a call must move `size` bytes at least, and multiply for `products` microseconds."""
    us, floor = graph_us(calls), max(size / RATE, products)
    rows.append({"op": op, "shape": shape, "tokens": tokens, "us": round(us, 2), "floor_us": round(floor, 2)})
    print(f"{op:26} {shape:24} {tokens:6} {us:9.2f} us  floor {floor:8.2f}  {floor / us * 100:5.1f} %", flush=True)


def many_of(size: float) -> int:
    return max(2, min(64, int(ENOUGH / size)))


def e8m0(*shape: int) -> Tensor:
    return torch.randint(118, 124, shape, device=GPU, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def e4m3(*shape: int) -> Tensor:
    return (torch.randn(shape, device=GPU) * 60).clamp(-440, 440).to(torch.float8_e4m3fn)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device=GPU).bfloat16()


LINEARS = (
    ("wq_a + wkv", 1536, 4096, 1), ("wq_b", 32768, 1024, 1), ("wo_a", 8192, 4096, 8), ("wo_b", 4096, 8192, 1),
    ("shared up", 4096, 4096, 1), ("shared down", 4096, 2048, 1), ("wq_b TP2", 16384, 1024, 1),
    ("wo_a TP2", 4096, 4096, 4), ("wo_b TP2", 4096, 4096, 1), ("shared up TP2", 2048, 4096, 1),
    ("shared down TP2", 4096, 1024, 1), ("indexer wq_b", 8192, 1024, 1),
)  # fmt: skip
FLOATS = (("gate", 256), ("CSA compressor", 2048), ("index compressor", 512), ("HCA compressor", 1024))


def linear() -> None:
    """FP8 linears of a layer, BF16 ones with float32 results, and the head."""
    for name, n, k, groups in LINEARS:
        sets = [(e4m3(n, k), e8m0(n // 128, k // 128)) for _ in range(many_of(n * k))]
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 1024, 4096, 8192):
            x = fp8_sim(bf16(m, groups * k), 128)
            calls = [partial(dense._product, x, w, s, groups, torch.bfloat16) for w, s in sets[: 64 if m < 99 else 4]]
            products = 2 * m * n * k / (FP8_RATE if groups == 1 else BF16_RATE)
            report("fp8 linear", f"{name} {n}x{k}", m, calls, n * k + 2 * m * (groups * k + n), products)
    for name, n in FLOATS:
        weights = [bf16(n, HIDDEN) for _ in range(64)]
        for m in (1, 8, 32, 128, 4096, 8192):
            x = bf16(m, HIDDEN)
            calls = [partial(dense.linear, x, w, dtype=torch.float32) for w in weights[: 64 if m < 99 else 8]]
            size, products = 2 * n * HIDDEN + m * (2 * HIDDEN + 4 * n), 2 * m * n * HIDDEN / BF16_RATE
            report("bf16 linear, f32 out", f"{name} {n}x{HIDDEN}", m, calls, size, products)
    for n in (129280, 64640):
        heads = [bf16(n, HIDDEN) for _ in range(2)]
        for m in (1, 8, 32):
            calls = [partial(dense.linear, bf16(m, HIDDEN), w, dtype=torch.float32) for w in heads]
            report("bf16 linear, f32 out", f"head {n}x{HIDDEN}", m, calls, 2 * n * HIDDEN + 4 * m * n)


def experts() -> None:
    """FP4 experts: I 2048 on one GPU, 1024 on each of two."""
    for width in (1024, 2048):
        shapes = ((EXPERTS, 2 * width, HIDDEN), (EXPERTS, HIDDEN, width))
        words = [
            torch.randint(-(2**31), 2**31 - 1, (e, n, k // 8), device=GPU, dtype=torch.int32) for e, n, k in shapes
        ]
        scales = [e8m0(e, n, k // 32) for e, n, k in shapes]
        layer = Fp4Experts(words[0], scales[0].view(torch.uint8), words[1], scales[1].view(torch.uint8))
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096, 8192):
            whole_experts(layer, tokens, width)
            if tokens > fp4.MOST_FEW:
                expert_products(layer, tokens, width)


def routings(tokens: int, count: int) -> list[Tensor]:
    return [torch.rand(tokens, EXPERTS, device=GPU).topk(TOPK, -1).indices.int() for _ in range(count)]


def expert_floor(chosen: Sequence[Tensor], width: int) -> tuple[float, float]:
    """Of one of the three matrices of every chosen expert: bytes, and microseconds of products."""
    distinct = sum(ids.unique().numel() for ids in chosen) / len(chosen)
    return distinct * width * HIDDEN * (1 / 2 + 1 / 32), 2 * chosen[0].numel() * width * HIDDEN / FP8_RATE


def whole_experts(layer: Fp4Experts, tokens: int, width: int) -> None:
    chosen = routings(tokens, 40 if tokens < 4 else 10 if tokens < 99 else 4)
    size, products = expert_floor(chosen, width)
    shares, shared = torch.rand(tokens, TOPK, device=GPU), bf16(tokens, HIDDEN)
    x, stored = fp8_sim(bf16(tokens, HIDDEN), 128), (layer.w13, layer.s13, layer.w2, layer.s2)
    calls = [partial(fp4.experts, x, c, shares, *stored, LIMIT, True, shared) for c in chosen]
    report("fp4 experts, whole", f"I {width}", tokens, calls, 3 * size, 3 * products)


def expert_products(layer: Fp4Experts, tokens: int, width: int) -> None:
    """Both products of many tokens without what stands around them."""
    chosen, shares = routings(tokens, 4), torch.rand(tokens, TOPK, device=GPU)
    size, products = expert_floor(chosen, width)
    tops = fp4_many.tops_of(layer) or ()
    plans = [planned(ids, EXPERTS) for ids in chosen]
    x, scales = quantise(bf16(tokens, HIDDEN))
    h, own = quantise(bf16(len(plans[0].pairs), width))
    ups = [partial(fp4_many.gate_up, x, by_slot(scales, p, shares), layer, tops[0], p, LIMIT) for p in plans]
    report("fp4 gate + up", f"I {width}", tokens, ups, 2 * size, 2 * products)
    downs = [partial(fp4_many.down, h, by_slot(own, p), layer, tops[1], p, tokens * TOPK) for p in plans]
    report("fp4 down", f"I {width}", tokens, downs, size, products)


def small() -> None:
    """What stands between the products: hyper-connections, norms, quantisers, routing."""
    fns = [torch.randn(24, STREAMS * HIDDEN, device=GPU) / 128 for _ in range(40)]
    scale, base, weight = torch.randn(3, device=GPU), torch.randn(24, device=GPU), bf16(HIDDEN)
    bias, table = torch.randn(EXPERTS, device=GPU), torch.randint(0, EXPERTS, (1000, TOPK), device=GPU)
    for m in (1, 8, 32, 128, 4096, 8192):
        some = 40 if m < 99 else 4
        x, y, one = bf16(m, STREAMS, HIDDEN), bf16(m, HIDDEN), m * HIDDEN * 2.0
        _, post, comb = streams.before(x, fns[0], scale, base, weight, EPS, EPS, 20)
        calls = [partial(streams.before, x, f, scale, base, weight, EPS, EPS, 20) for f in fns[:some]]
        report("hyper: before, with norm", f"{STREAMS}x{HIDDEN}", m, calls, fns[0].nbytes + 5 * one)
        report("hyper: after", f"{STREAMS}x{HIDDEN}", m, [partial(streams.after, y, x, post, comb)] * some, 9 * one)
        head = [partial(streams.folded, x, f[:4], scale[:1], base[:4], weight, EPS, EPS) for f in fns[:some]]
        report("hyper: head, with norm", f"{STREAMS}x{HIDDEN}", m, head, fns[0].nbytes / 6 + 5 * one)
        report("rms norm", f"{HIDDEN}", m, [partial(rms_norm, y, weight, EPS)] * some, 2 * one)
        q = bf16(m, 64, 512)
        report("rms norm of heads", "64x512", m, [partial(rms_norm, q, None, EPS)] * some, 2 * q.nbytes)
        report("fp8 operand", f"{HIDDEN}", m, [partial(fp8_sim, y, 128)] * some, 2 * one)
        report("swiglu, fp8 operand", "2x1024", m, [partial(gated, bf16(m, 2048), LIMIT, True)] * some, m * 6144.0)
        logits, ids = torch.randn(m, EXPERTS, device=GPU), torch.randint(0, 1000, (m,), device=GPU)
        for by, size, args in (("score", 1072.0, (bias, None)), ("hash", 1120.0, (None, table))):
            calls = [partial(route, logits, *args, ids, TOPK, 1.5)] * some
            report(f"route by {by}", f"{EXPERTS}", m, calls, m * size)


QUERIES, SPAN, WIDTH, CHOSEN, INDEX_HEADS, INDEX_DIM = 4096, 128, 512, 512, 64, 128


def prefill_ops() -> None:
    """A chunk of a prompt at several depths: attention of half of the heads, the indexer of all, the cache read."""
    for start in (0, 28 << 10, 124 << 10, (1 << 20) - QUERIES):
        depth = f"after {start >> 10}K"
        for name, ratio in (("SWA", 0), ("CSA", 4), ("HCA", 128)):
            prefill_attention(f"{name}, 32 heads, {depth}", start, ratio)
        prefill_index(depth, start)


def prefill_attention(shape: str, start: int, ratio: int) -> None:
    position = torch.arange(start, start + QUERIES, device=GPU)
    number = (position + 1) // max(ratio, 1)
    q, near = bf16(QUERIES, 32, WIDTH), bf16(min(start, SPAN - 1) + QUERIES, WIDTH)
    entries = bf16((start + QUERIES) // ratio, WIDTH) if ratio else None
    chosen, seen = None, number if ratio else 0 * number
    if ratio == 4:
        chosen = (torch.rand(QUERIES, CHOSEN, device=GPU) * number.unsqueeze(1)).sort(1).values.int()
        chosen[torch.arange(CHOSEN, device=GPU) >= number.unsqueeze(1)] = -1
        seen = number.clamp_max(CHOSEN)
    angle = torch.randn(QUERIES, 32, device=GPU)
    turn, sink = torch.stack((angle.cos(), angle.sin()), -1), torch.randn(32, device=GPU)
    flop = 4.0 * 32 * WIDTH * float((seen + (position + 1).clamp_max(SPAN)).sum())
    call = partial(prefill_triton.attend, q, near, entries, chosen, sink, turn, start, ratio, SPAN)
    report("attention", shape, QUERIES, [call], 0.0, flop / BF16_RATE)


def prefill_index(depth: str, start: int) -> None:
    count = (start + QUERIES) // 4
    pages = -(-count // 32)
    table = torch.randperm(pages, device=GPU).int().view(1, -1)
    rows = Rows(e4m3(pages, 32, 576).view(torch.uint8), e8m0(pages, 32, 8).view(torch.uint8), 64)
    call = partial(prefill_read_triton.read_rows, table, rows, 0, 0, count)
    report("rows unpacked", f"{count}x512", count, [call], count * (584 + 1024))
    for packed in (False, True):
        store = Keys.empty(pages, 32, INDEX_DIM, packed, torch.device(GPU))
        for plane, new in zip(store.planes, store.pack(bf16(pages, 32, INDEX_DIM)), strict=True):
            plane.copy_(new)
        call = partial(prefill_read_triton.read_keys, table, store, 0, count)
        size = count * (132 + (68 if packed else 132))
        report("keys end to end", f"{count}x128, {'FP4' if packed else 'FP8'}", count, [call], size)
    keys, scales = prefill.keys(store, table, 0, count)
    q, weights = fp4_sim(bf16(QUERIES, INDEX_HEADS, INDEX_DIM)), torch.randn(QUERIES, INDEX_HEADS, device=GPU)
    pairs = float(((torch.arange(start, start + QUERIES) + 1) // 4).sum())
    call = partial(prefill_index_triton.select, q, weights, keys, scales, start, CHOSEN)
    flop = 2.0 * INDEX_HEADS * INDEX_DIM * pairs
    report("indexer", depth, QUERIES, [call], 0.0, flop / FP8_RATE)


OPS: tuple[Callable[[], None], ...] = (small, linear, experts, prefill_ops)
SECTIONS = dict(zip(("small", "linear", "experts", "prefill"), OPS, strict=True))


def markdown() -> str:
    """The rows as a table, with the machine and the versions above it."""
    versions = f"One {torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}."
    lines = [
        versions,
        "",
        "| op | shape | tokens | µs | floor µs | % of floor |\n| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        us, floor = float(row["us"]), float(row["floor_us"])
        share = f"{floor / us * 100:.0f}"
        lines.append(f"| {row['op']} | {row['shape']} | {row['tokens']} | {us:.1f} | {floor:.1f} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="also write them as a table to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA device; without one, test the kernels by pytest -m external")
    torch.manual_seed(0)
    for name in args.only.split(","):
        try:
            with torch.inference_mode():
                SECTIONS[name]()
        except Exception:
            traceback.print_exc(limit=4)
            print(f"section {name} stopped; the others go on", file=sys.stderr)
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown())


if __name__ == "__main__":
    main()
