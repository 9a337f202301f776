"""A small engine for tests of the cache: scheduler, pages, tiers and a model; every row of the streams is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.api import FinishReason, GenerateRequest, SamplingParams
from fathom.engine.cache import PagedCache
from fathom.engine.disk import Disk
from fathom.engine.fingerprint import fingerprint
from fathom.engine.pages import PagePool
from fathom.engine.prefix import PrefixCache
from fathom.engine.request import Sequence
from fathom.engine.scheduler import Piece, Scheduler
from fathom.model.batch import Batch, Span
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from tests import oracle
from tests.oracle import Session

PAGE, ANSWER = 128, 3

TINY: Mapping[str, Any] = {
    "num_hidden_layers": 3, "compress_ratios": [4, 128, 0, 0], "index_topk": 8, "sliding_window": 100,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hash_layers": 1,
}  # fmt: skip


def tiny(seed: int = 3, numerics: Numerics | None = None, **fixed: Any) -> Transformer:
    """A random model of three layers, one of each kind."""
    config = oracle.draw_config(seed, **{**TINY, **fixed})
    return oracle.our_model(config, oracle.draw_weights(config, seed), numerics)


@dataclass
class Prompt:
    """A request and what came of it: `rows` by the position of their first token."""

    ids: list[int]
    namespace: str = ""
    keep: tuple[int, ...] = ()
    answer: int = ANSWER
    rows: list[tuple[int, Tensor]] = field(default_factory=list)
    sequence: Sequence | None = None

    @property
    def cached(self) -> int:
        assert self.sequence
        return self.sequence.cached

    @property
    def streams(self) -> Tensor:
        """Of every position from `cached` on."""
        return torch.cat([rows for _, rows in self.rows])


class Machine:
    """Runs prompts to their ends; answers are made up, so that they are known beforehand."""

    def __init__(
        self,
        model: Transformer,
        folder: Path | None = None,
        *,
        pages: int = 40,
        slots: int = 3,
        host: int = 1 << 30,
        disk: int = 1 << 30,
        turns: bool = False,
    ) -> None:
        self.model, self.pool = model, PagePool(pages)
        self.cache = PagedCache(model.config, model.numerics, slots, pages)
        mark = fingerprint(model)
        self.prefix = PrefixCache(self.pool, self.cache, mark, host, Disk(folder, mark, disk) if folder else None)
        leaving = self.save_turn if turns else None
        self.scheduler = Scheduler(self.pool, slots, 512, self.prefix, leaving)

    def run(self, *prompts: Prompt) -> None:
        """All at once."""
        mine = {}
        for prompt in prompts:
            request = GenerateRequest(
                prompt_ids=prompt.ids,
                params=SamplingParams(max_tokens=prompt.answer),
                namespace=prompt.namespace,
                keep=prompt.keep,
            )
            prompt.sequence = Sequence.open(request, 1 << 20)
            mine[prompt.sequence] = prompt
            self.scheduler.add(prompt.sequence)
        while self.scheduler.waiting or self.scheduler.running:
            self.step(mine)

    @torch.inference_mode()
    def step(self, mine: dict[Sequence, Prompt]) -> None:
        plan = self.scheduler.plan()
        for sequence in plan.preempted:
            mine[sequence].rows.clear()
        for piece, rows in zip(plan.pieces, self.computed(plan.pieces), strict=True):
            mine[piece.sequence].rows.append((piece.start, rows))
        self.scheduler.advance(plan)
        for piece in plan.pieces:
            self.after(piece)

    def computed(self, pieces: tuple[Piece, ...]) -> Iterable[Tensor]:
        spans = []
        for piece in pieces:
            assert piece.sequence.slot is not None
            self.cache.bind(piece.sequence.slot, piece.sequence.pages)
            spans.append(Span(piece.start, piece.count, piece.sequence.slot))
        tokens = torch.tensor([i for p in pieces for i in p.sequence.ids[p.start : p.end]])
        return self.model(tokens, Batch.step(spans, "all"), self.cache).split([p.count for p in pieces])

    def after(self, piece: Piece) -> None:
        sequence = piece.sequence
        if sequence.resumable(piece.end) and piece.end <= sequence.prompt:
            self.save(sequence, piece.end)
        if piece.samples and sequence.append(made_up(sequence.ids, self.model.config.vocab_size)):
            self.scheduler.finish(sequence, FinishReason.LENGTH)

    def save(self, sequence: Sequence, at: int) -> None:
        assert sequence.slot is not None
        self.prefix.save(sequence.namespace, sequence.ids, at, sequence.pages, sequence.slot)

    def save_turn(self, sequence: Sequence) -> None:
        self.save(sequence, sequence.at - sequence.at % PAGE)


def made_up(ids: list[int], vocabulary: int) -> int:
    """An answer's next token."""
    return (7 * ids[-1] + len(ids)) % vocabulary


def continued(ids: list[int], count: int, vocabulary: int) -> list[int]:
    """The ids with a made-up answer."""
    out = list(ids)
    for _ in range(count):
        out.append(made_up(out, vocabulary))
    return out


def cold(model: Transformer, prompt: Prompt, parts: Iterable[int] = ()) -> Tensor:
    """Streams of the prompt and all of its answer but the last token, alone, without pages and tiers.

    parts: ends of stretches of the prompt that were answers once, so computed token by token, alternating with prompts.
    """
    ids = continued(prompt.ids, prompt.answer, model.config.vocab_size)
    session, out = Session(model, 1, 1 << 14), []
    ends = [*parts, len(prompt.ids), len(ids) - 1]
    for n, end in enumerate(ends):
        while (at := session.length[0]) < end:
            stop = at + 1 if n % 2 else min(end, at - at % PAGE + PAGE)
            out.append(session.streams({0: ids[at:stop]})[0])
    return torch.cat(out)
