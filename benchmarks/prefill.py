"""Prefill of V4-Flash on one H200: random weights of every size of the real ones, one rank of two.

    python benchmarks/prefill.py [--only 32k,1m,1m-whole,small-32k] [--out FOLDER]

1m: eight chunks of a prompt of 1,048,576 tokens, at evenly spaced depths; 1m-whole: all of it; small-32k: 32,768 tokens
by the embedded model. Both ranks, each on a GPU of one machine, their sums included:

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/prefill.py [--only pair-32k,pair-1m]
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from gpu_page import take

from fathom.cli.bench_device import DeviceJob, asked, gpu, inference, measure, ranks, where, whole_config
from fathom.cli.bench_prefill import PrefillBench

K, M = 1 << 10, 1 << 20


def row(tokens: int, runs: int, samples: int = 0, together: bool = False) -> dict[str, Any]:
    """A part of one prompt."""
    job = DeviceJob(mode="prefill", model="flash", synthetic=True, contexts=(), ranks=2, together=together)
    config, place = whole_config(job), ranks().device if together else gpu(job.device)
    bench = PrefillBench(job, config, place)
    with inference():
        measured = bench.row(tokens, runs, samples)
    return {**asked(job, config), **where(place), **bench.about, "rows": [measured]}


def small() -> dict[str, Any]:
    """The part about the embedded model."""
    return measure(DeviceJob(mode="prefill", contexts=(32 * K,)))


PARTS = {
    "32k": partial(row, 32 * K, 3),
    "1m": partial(row, M, 1, 8),
    "1m-whole": partial(row, M, 1),
    "small-32k": small,
}

TOGETHER = {
    "pair-32k": partial(row, 32 * K, 3, together=True),
    "pair-1m": partial(row, M, 1, 8, together=True),
}

if __name__ == "__main__":
    take(TOGETHER if "RANK" in os.environ else PARTS)
