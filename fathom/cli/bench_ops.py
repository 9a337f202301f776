"""What the ops below the model cost at a model's shapes: the torch references, on random data, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

from fathom.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS = (1, 128)
"""A decode step, and a tile of prefill."""

_MOST_EXPERTS = 32  # of the largest models a layer's experts alone would not fit
_BATCH_SECONDS = 0.02

Case = tuple[str, str, Callable[[], object]]


def measure_ops(config: ModelConfig, dtype: str, threads: int | None, runs: int) -> list[dict[str, Any]]:
    """Median microseconds of each op at each of `ROWS`: a list of {op, shape, rows, us}."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    with torch.inference_mode():
        return [
            {"op": op, "shape": shape, "rows": rows, "us": 1e6 * _seconds(call, runs)}
            for rows in ROWS
            for op, shape, call in _cases(config, kind, rows)
        ]


def _seconds(call: Callable[[], object], runs: int) -> float:
    """Median over `runs` of the mean over as many calls as fill a while."""
    call()
    begin = time.perf_counter()
    call()
    repeats = max(1, int(_BATCH_SECONDS / (time.perf_counter() - begin)))
    return median(_mean(call, repeats) for _ in range(runs))


def _mean(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _cases(c: ModelConfig, dtype: torch.dtype, rows: int) -> Iterator[Case]:
    import torch

    from fathom.kernels.linear import linear
    from fathom.kernels.quant import WEIGHT_BLOCK, fp8_sim
    from fathom.kernels.sinkhorn import mixing

    wide, n = c.num_attention_heads * c.head_dim, c.hc_mult
    latent, weight = _random(dtype, rows, c.q_lora_rank), _random(dtype, wide, c.q_lora_rank)
    yield "linear", f"{c.q_lora_rank} -> {wide}", lambda: linear(latent, weight)
    x = _random(dtype, rows, c.hidden_size)
    yield "fp8_sim", f"{c.hidden_size}", lambda: fp8_sim(x, WEIGHT_BLOCK)
    m, scale, base = (_random(torch.float32, *shape) for shape in ((rows, (2 + n) * n), (3,), ((2 + n) * n,)))
    rounds = c.hc_sinkhorn_iters
    yield "sinkhorn", f"{n} x {n}, {rounds} rounds", lambda: mixing(m, scale, base, n, rounds, c.hc_eps)
    yield _attend_case(c, dtype, rows)
    yield _experts_case(c, x)


def _attend_case(c: ModelConfig, dtype: torch.dtype, rows: int) -> Case:
    """A window and as many entries as the indexer keeps; a tile's queries each see a part of them."""
    import torch

    from fathom.kernels.attention import attend

    seen = c.sliding_window + rows - 1 + c.index_topk
    q, kv = _random(dtype, rows, c.num_attention_heads, c.head_dim), _random(dtype, seen, c.head_dim)
    visible = None if rows == 1 else torch.rand(rows, seen) < 0.5
    sink = torch.zeros(c.num_attention_heads)
    shape = f"{c.num_attention_heads} heads x {c.head_dim}, {seen} rows"
    return "attend", shape, lambda: attend(q, kv, visible, sink)


def _experts_case(c: ModelConfig, x: Tensor) -> Case:
    """Dense weights; every token chooses at random."""
    import torch

    from fathom.kernels.experts import experts

    count, hidden, width = min(c.n_routed_experts, _MOST_EXPERTS), c.hidden_size, c.moe_intermediate_size
    k = min(c.num_experts_per_tok, count)
    w13, w2 = _random(x.dtype, count, 2 * width, hidden), _random(x.dtype, count, hidden, width)
    chosen, weights = torch.rand(x.shape[0], count).topk(k, -1).indices, torch.full((x.shape[0], k), 1 / k)
    shape = f"{k} of {count}, {hidden} x {width}"
    return "experts", shape, lambda: experts(x, chosen, weights, w13, None, w2, None, c.swiglu_limit, False)


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    import torch

    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)
