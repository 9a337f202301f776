"""Hybrid attention: a sliding window, compressed entries and a sink under one softmax. Reference 2.6 to 2.9.

The layer kinds differ only in which compressed entries a query sees: none (SWA, ratio 0), the indexer's choice (CSA,
ratio 4), or all that are closed (HCA, ratio 128). Shapes: T tokens, H heads, C head dim, G output groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels import decode, prefill, store
from fathom.kernels.attention import attend
from fathom.kernels.decode import Memory
from fathom.kernels.linear import linears
from fathom.kernels.store import Norms, Projected
from fathom.model.batch import Tile
from fathom.model.cache import LayerState
from fathom.model.compressor import Compressor
from fathom.model.indexer import Indexer, visible_entries
from fathom.model.layers import GroupedLinear, Linear, Numerics, RMSNorm, rms
from fathom.model.rope import rotate
from fathom.model.step import Step

IndexInput = tuple[Tensor, Tensor, Tensor]
"""Index queries [T, h, d], values and gates of the index keys, weights of the heads [T, h]."""
_GATHER_FROM = 8
"""Selected entries are gathered once there are this many times more of them than a query keeps; below, masked."""


class Attention(nn.Module):
    """Low-rank queries, one vector per token that is key and value of all heads, grouped output projection."""

    def __init__(self, config: ModelConfig, ratio: int, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.ratio, self.numerics = config, ratio, numerics
        wide = config.num_attention_heads * config.head_dim
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, wide)
        self.wkv = Linear(config.hidden_size, config.head_dim)
        self.kv_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.wo_a = GroupedLinear(wide // config.o_groups, config.o_groups * config.o_lora_rank, config.o_groups)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, config.hidden_size)
        if ratio:
            self.compressor = Compressor(config, ratio, config.head_dim, "compressor")
        if ratio == 4:
            self.indexer = Indexer(config, numerics)

    def forward(self, x_TD: Tensor, step: Step, state: LayerState) -> Tensor:
        """[T, D] -> [T, D]; `state` keeps the layer's rows between calls."""
        memory = state.memory
        o_THC = self._by_tile(x_TD, step, state) if memory is None else self._in_memory(x_TD, step, memory)
        return linears(self.wo_a(o_THC), (self.wo_b.part(self.numerics.quantize),))[0]

    def _by_tile(self, x: Tensor, step: Step, state: LayerState) -> Tensor:
        """[T, H, C]: pieces of sequences one after the other, each of any length."""
        operand = self.numerics.operand(x)
        latent = self.numerics.operand(self.q_norm(self.wq_a(operand)))
        q = self.wq_b(latent).unflatten(-1, (self.config.num_attention_heads, self.config.head_dim))
        kv = self.wkv(operand)
        forth, back = step.turns(self.ratio)
        q = rotate(rms(q, self.config.rms_norm_eps), forth.unsqueeze(1))
        kv = self._stored(rotate(self.kv_norm(kv), forth))
        return rotate(torch.cat(list(self._tiles(x, latent, q, kv, step, state))), back.unsqueeze(1))

    def _in_memory(self, x: Tensor, step: Step, memory: Memory) -> Tensor:
        """[T, H, C]: the same by kernels that store and read the rows, without the host: `Batch.tokens`, `pieces`."""
        quantised, c = self.numerics.quantize, self.config
        first = [self.wq_a.part(quantised), self.wkv.part(quantised)]
        first += [self.compressor.part()] if self.ratio else []
        first += [self.indexer.compressor.part(), self.indexer.weights_proj.part()] if self.ratio == 4 else []
        latent, kv, *rest = linears(x, first)
        second = [self.wq_b.part(quantised)]
        second += [self.indexer.wq_b.part(quantised)] if self.ratio == 4 else []
        q, *index_q = linears(latent, second, self.q_norm.weight, c.rms_norm_eps)
        entries, keys, weights = (*rest, None, None, None)[:3]
        heads = index_q[0].unflatten(-1, (c.index_n_heads, -1)) if index_q else None
        made = Projected(q.unflatten(-1, (c.num_attention_heads, -1)), kv, entries, heads, keys)
        return (self._pieces if step.batch.tiles else self._tokens)(made, weights, step, memory)

    def _norms(self) -> Norms:
        """The weights between the projections and the attention."""
        poolings = [self.compressor.pooling] if self.ratio else []
        poolings += [self.indexer.compressor.pooling] if self.ratio == 4 else []
        return Norms(self.kv_norm.weight, self.config.rms_norm_eps, *poolings)

    def _tokens(self, made: Projected, weights: Tensor | None, step: Step, memory: Memory) -> Tensor:
        """[T, H, C] of the next token of each sequence."""
        where, most = step.where, memory.most
        q, index_q = store.prepare(made, where, memory, self._norms())
        chosen = None
        if index_q is not None and weights is not None:
            chosen = decode.select(index_q, weights, where, memory, self.config.index_topk, most)
        return decode.attend(q, self.attn_sink, where, memory, most, chosen)

    def _pieces(self, made: Projected, weights: Tensor | None, step: Step, memory: Memory) -> Tensor:
        """[T, H, C] of pieces of prompts, one sequence after the other."""
        where, norms, span = step.where, self._norms(), self.config.sliding_window
        q, index_q, rows = store.enter(made, where, memory, norms)
        out, end = torch.empty_like(q), step.batch.tiles[-1].rows.stop
        out[end:] = 0
        for tile in step.batch.tiles:
            first = max(0, tile.start + 1 - span)
            near = torch.cat((store.recent(memory.window, tile.slot, first, tile.start - first), tile.of(rows)))
            entries, chosen = self._seen(tile, index_q, weights, memory)
            turn = where.turn(self.ratio)[tile.rows]
            out[tile.rows] = prefill.attend(
                tile.of(q), near, entries, chosen, self.attn_sink, turn, tile.start, self.ratio, span
            )
            store.remember(made, where, memory, norms, tile.rows.start, tile.rows.stop, tile.end)
        return out

    def _seen(
        self, tile: Tile, index_q: Tensor | None, weights: Tensor | None, memory: Memory
    ) -> tuple[Tensor | None, Tensor | None]:
        """A piece's compressed entries, end to end, and in CSA layers which of them each query keeps."""
        if memory.entries is None or tile.end < self.ratio:
            return None, None
        entries = prefill.unpacked(memory.entries, memory.table, tile.slot, 0, tile.end // self.ratio)
        if index_q is None or weights is None or memory.keys is None:
            return entries, None
        keys = prefill.keys(memory.keys, memory.table, tile.slot, tile.end // 4)
        return entries, self.indexer.chosen(tile, index_q, weights, keys)

    def _stored(self, row: Tensor) -> Tensor:
        return self.numerics.row(row, self.config.qk_rope_head_dim)

    def _tiles(self, x: Tensor, latent: Tensor, q: Tensor, kv: Tensor, step: Step, state: LayerState):  # type: ignore[no-untyped-def]
        """The attention of one tile after the other; each stores its rows before it looks."""
        projected = self.compressor.projections(x, step.batch.positions) if self.ratio else x
        index = self._index(x, latent, step) if self.ratio == 4 else ()
        for tile in step.batch.tiles:
            first = max(0, tile.start + 1 - self.config.sliding_window)
            window = state.recent("window", tile, tile.of(kv), first)
            entries, kept = self._compressed(tile, projected, index, step, state)
            out = self._attend(tile, tile.of(q), window, entries, kept)
            yield out if tile.docs == 1 else out.flatten(0, 1)

    def _index(self, x: Tensor, latent: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        projected = self.indexer.compressor.projections(x, step.batch.positions)
        return projected, *self.indexer.queries(x, latent, step)

    def _compressed(
        self, tile: Tile, projected: Tensor, index: tuple[Tensor, ...], step: Step, state: LayerState
    ) -> tuple[Tensor | None, Tensor | None]:
        """The sequence's entries [n, C] and which of them each query keeps, bool [t, n]; with documents in front.

        A single query sees all entries that are closed: None, unless the indexer chooses among them.
        """
        if not self.ratio:
            return None, None
        entries = self.compressor(tile, tile.of(projected), step, state, self._stored)
        kept = None if tile.single else visible_entries(tile, self.ratio, entries.device)
        if self.ratio == 4:
            proj, q, weights = index
            keys = self.indexer.compressor(tile, tile.of(proj), step, state, self.numerics.index)
            kept = self.indexer(tile, keys, tile.of(q), tile.of(weights), kept)
        return entries, kept

    def _attend(self, tile: Tile, q: Tensor, window: Tensor, entries: Tensor | None, kept: Tensor | None) -> Tensor:
        if tile.single:
            chosen = entries if entries is None or kept is None else entries[kept[0]]
            rows = window if chosen is None else torch.cat((window, chosen))
            return attend(q, rows, None, self.attn_sink)
        seen = _visible_window(tile, self.config.sliding_window, window.shape[-2], q.device)
        if entries is None or kept is None:
            return attend(q, window, seen, self.attn_sink)
        if self.ratio == 4 and tile.docs == 1 and entries.shape[0] > _GATHER_FROM * self.config.index_topk:
            return self._attend_gathered(q, window, seen, entries, kept)
        both = torch.cat((seen.expand(*kept.shape[:-1], -1), kept), -1)
        return attend(q, torch.cat((window, entries), -2), both, self.attn_sink)

    def _attend_gathered(self, q: Tensor, window: Tensor, seen: Tensor, entries: Tensor, kept: Tensor) -> Tensor:
        """As `_attend`, each query against a copy of its own entries: less work than masking many of them."""
        own, real = _gathered(entries, kept, self.config.index_topk)
        rows = torch.cat((window.expand(q.shape[0], -1, -1), own), 1)
        visible = torch.cat((seen, real), -1).unsqueeze(1)
        return attend(q.unsqueeze(1), rows, visible, self.attn_sink).squeeze(1)


def _visible_window(tile: Tile, size: int, rows: int, device: torch.device) -> Tensor:
    """bool [t, rows]: the last `size` tokens up to the query itself; the rows end at the tile's last token."""
    at = torch.arange(tile.start, tile.end, device=device).unsqueeze(1)
    key = torch.arange(tile.end - rows, tile.end, device=device)
    return (key <= at) & (key > at - size)


def _gathered(entries: Tensor, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each query's own k entries [t, k, C] in position order, and which of them are real (bool [t, k])."""
    n = kept.shape[1]
    order = torch.where(kept, torch.arange(n, 0, -1, device=kept.device), 0).topk(k, -1)
    real = order.values > 0
    return entries[torch.where(real, order.indices, 0)], real
