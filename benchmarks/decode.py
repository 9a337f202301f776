"""Decode of V4-Flash on one H200: random weights of every size of the real ones, one rank of two.

    python benchmarks/decode.py [--only first,short,served,long,many,packed,engine,peer,small] [--out FOLDER]

first: from weights in place to the first token; short: 4K; served: 4K over a cache for 1M, as a server has it unless
--max-context says less; engine: the same, planned, sampled and told by an engine; long: 128K and 1M; many: 32
sequences; packed: index keys as FP4; peer: five whole layers beside transformers; small: the embedded model, its own
weights. Random weights are made in seconds; a part is one load.
Both ranks, each on a GPU of one machine, their sums included:

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/decode.py [--only pair,pair-long]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gpu_page import take

from fathom.cli.bench_decode import DecodeBench, through_engine
from fathom.cli.bench_device import DeviceJob, asked, gpu, measure, ranks, where, whole_config
from fathom.engine.graphs import SIZES

K, M = 1 << 10, 1 << 20


def bench(
    keys: str = "fp8", max_context: int | None = None, together: bool = False
) -> tuple[DecodeBench, dict[str, Any]]:
    """One rank's model in place, and what a report says of it."""
    job = DeviceJob(
        mode="decode", model="flash", synthetic=True, contexts=(), ranks=2, keys=keys, max_context=max_context,
        together=together,
    )  # fmt: skip
    config, place = whole_config(job), ranks().device if together else gpu(job.device)
    made = DecodeBench(job, config, place)
    return made, {**asked(job, config), **where(place), **made.about}


def rows(cases: Sequence[tuple[int, int]], *made_as: Any, **named: Any) -> dict[str, Any]:
    """A part of several steps: (context, sequences); the launches of the last one. made_as: see `bench`."""
    made, said = bench(*made_as, **named)
    measured = [made.row(context, batch, breakdown=(context, batch) == cases[-1]) for context, batch in cases]
    return {**said, "rows": measured, "launches": made.launches}


def first() -> dict[str, Any]:
    """The part about the first token, over a cache for the whole context, as a server has it."""
    made, said = bench(max_context=M)
    return {**said, "first_token": made.first_token(SIZES)}


def engine() -> dict[str, Any]:
    """The part about steps that an engine makes, over a cache of the whole context, as a server has it."""
    from fathom.engine.llm import LLM

    made, said = bench()
    # Random weights would end answers anywhere: by a token that the half of the vocabulary of a rank does not have.
    made.model.config = replace(made.model.config, eos_token_id=made.config.vocab_size - 1)
    llm, tokens = LLM(made.model), made.config.vocab_size // 2
    try:
        return {**said, "engine": [through_engine(llm, tokens, 4 * K, batch) for batch in (1, 8, 32)]}
    finally:
        llm.close()


def peer() -> dict[str, Any]:
    """The part beside transformers: whole layers, SWA, CSA, HCA, CSA, HCA."""
    ratios = (0, 4, 128, 4, 128)
    job = DeviceJob(
        mode="decode", model="flash", synthetic=True, contexts=(K, 8 * K), ratios=ratios, peer="transformers"
    )
    return measure(job)


def small() -> dict[str, Any]:
    """The part about the embedded model."""
    return measure(DeviceJob(mode="decode", contexts=(512, 4 * K)))


PARTS = {
    "first": first,
    "short": partial(rows, ((4 * K, 8), (4 * K, 32), (4 * K, 1))),
    "served": partial(rows, ((4 * K, 8), (4 * K, 32), (4 * K, 1)), max_context=M),
    "long": partial(rows, ((128 * K, 1), (128 * K, 8), (M, 1))),
    "many": partial(rows, ((128 * K, 32), (4 * K, 8))),
    "packed": partial(rows, ((4 * K, 1), (M, 1)), "fp4"),
    "engine": engine,
    "peer": peer,
    "small": small,
}

TOGETHER = {
    "pair": partial(rows, ((4 * K, 8), (4 * K, 32), (4 * K, 1)), together=True),
    "pair-long": partial(rows, ((128 * K, 1), (128 * K, 32), (M, 1)), together=True),
}

if __name__ == "__main__":
    take(TOGETHER if "RANK" in os.environ else PARTS)
