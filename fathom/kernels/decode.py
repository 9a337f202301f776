"""A decode step's attention, all sequences at once: what is selected, what is attended to. What is stored: `store`.

Reference 2.5 to 2.9, 4, 5.1. Positions, slots and page tables are device tensors, no shape depends on data, and nothing
waits for the host: a step of B tokens can be captured in a CUDA graph. These are the contracts with their references in
torch; the GPU's versions stand in `index_triton` and `attend_triton`. A token's result does not depend on the others in
the batch, nor on where its pages are.

Several tokens of one sequence (drafts) may be in a batch if they are neighbours, in order, and no more than 8.
Names: B tokens, H heads, C head dim, h index heads, d index dim, P = rope dims / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fathom.kernels.dispatch import beside
from fathom.kernels.indexer import index_scores, select_topk
from fathom.kernels.stored import Keys, Rows

PAGE = 128
"""Tokens of a page."""
PLAIN, COMPRESSED, BLOCK_4, BLOCK_128 = range(4)
"""The rotations of a token: in layers without compression and with it, and of the block of 4 or 128 that it is in."""


@dataclass(frozen=True)
class Tokens:
    """The next token of each of B sequences.

    slots int32 [B], -1 for padding, which stands at the end and stores nothing; positions int32 [B];
    turns float32 [4, B, P, 2]: cosines and sines, in the order of the kinds above.
    """

    slots: Tensor
    positions: Tensor
    turns: Tensor

    @staticmethod
    def at(slots: Tensor, positions: Tensor, plain: Tensor, compressed: Tensor) -> Tokens:
        """With rotations of the frequencies [P] of layers without compression and with it; once a step.

        Positions are int32 and not negative. Three launches: at a step's begin each costs its latency.
        """
        masks, freqs, one = _kinds(plain, compressed)
        angles = (positions & masks).unsqueeze(-1) * freqs
        return Tokens(slots, positions, torch.view_as_real(torch.polar(one, angles)))

    def turn(self, ratio: int, block: bool = False) -> Tensor:
        """float32 [B, P, 2] in a layer of this ratio: of the token, or of its block's first position."""
        if block:
            return self.turns[BLOCK_4 if ratio == 4 else BLOCK_128]
        return self.turns[COMPRESSED if ratio else PLAIN]


@lru_cache(maxsize=8)
def _kinds(plain: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the kinds of rotations: masks of a block's first position [4, 1], frequencies [4, 1, P]; and 1."""
    with torch.inference_mode(False):  # kept for later calls
        masks = torch.tensor([[-1], [-1], [-4], [-128]], dtype=torch.int32, device=plain.device)
        freqs = torch.stack((plain, compressed, compressed, compressed)).unsqueeze(1)
        return masks, freqs, torch.ones(1, device=plain.device)


@dataclass(frozen=True)
class Memory:
    """What a layer keeps of all sequences.

    window   Rows [slots, ring, ...]: the row of position p is row p % ring of its slot; `span` of them are looked at
    table    int32 [slots, most pages]: the pages of each slot's sequence, the same for all layers
    tail     float32 [slots, ring, 2 * width]: values, then gates with their bias, of the last tokens
    entries  Rows [pages, 128 / ratio, ...]
    key_tail, keys   the indexer's tail and entries (ratio 4)
    longest  tokens of the longest sequence of a step, if less than `table` has room for: the size of launches, no bit
    """

    ratio: int
    span: int
    window: Rows
    table: Tensor
    tail: Tensor | None = None
    entries: Rows | None = None
    key_tail: Tensor | None = None
    keys: Keys | None = None
    longest: int | None = None

    @property
    def most(self) -> int:
        """Tokens that a step's sequence has at most."""
        return self.longest or self.table.shape[1] * PAGE


@beside("index_triton")
def select(q: Tensor, weights: Tensor, tokens: Tokens, memory: Memory, k: int, most: int) -> Tensor:
    """The k best entries of each token by the indexer's scores, as rows of `memory.entries`: int32 [B, k], in the order
    of the sequence, -1 behind the last. All while there are no more than k; equal scores go to the earlier entry.

    q [B, h, d] as `store.prepare` made it; weights BF16 [B, h] after weights_proj; most: tokens of the longest.
    """
    assert memory.keys is not None
    number = (tokens.positions.long() + 1) // 4
    entry = torch.arange(most // 4, device=q.device)
    rows = page_rows(memory.table, tokens.slots, entry, memory.keys.per)
    scaled = (weights * (q.shape[2] ** -0.5 * q.shape[1] ** -0.5)).float()
    scores = index_scores(q.float().unsqueeze(1), scaled.unsqueeze(1), memory.keys.read(rows).float()).squeeze(1)
    visible = entry < number.unsqueeze(1)
    kept = select_topk(torch.where(visible, scores + 0.0, float("-inf")), k)
    order = torch.where(kept, most // 4 - entry, 0)
    best = torch.nn.functional.pad(order, (0, max(0, k - order.shape[1]))).topk(k, -1)
    place = torch.where(best.values > 0, best.indices, 0)
    return torch.where(best.values > 0, rows.gather(1, place), -1).int()


@beside("attend_triton")
def attend(q: Tensor, sink: Tensor, tokens: Tokens, memory: Memory, most: int, chosen: Tensor | None = None) -> Tensor:
    """Attention over the window, the entries (those `chosen`, rows int32 [B, k], or all that are closed) and a sink
    float32 [H], rotated back to position 0: BF16 [B, H, C].

    q BF16 [B, H, C] as `store.prepare` made it; most: the longest sequence, in tokens. Logits and sums are float32,
    probabilities are rounded to BF16.
    """
    rows, seen = _window(tokens, memory)
    if memory.ratio:
        more, there = _entries(tokens, memory, most, chosen)
        rows, seen = torch.cat((rows, more), 1), torch.cat((seen, there), 1)
    logits = (q.float() @ rows.float().mT) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen.unsqueeze(1), float("-inf"))
    sinks = sink.expand(q.shape[:2]).unsqueeze(-1)
    weights = torch.cat((logits, sinks), -1).softmax(-1)[..., :-1].to(torch.bfloat16)
    out = (weights.float() @ rows.float()).to(torch.bfloat16)
    turn = tokens.turn(memory.ratio).unsqueeze(1)
    return rotated(out, turn * turn.new_tensor((1.0, -1.0)))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """The last 2P values of x [..., C] turned by cosines and sines [..., P, 2], rounded to x's dtype."""
    front = x.shape[-1] - 2 * turn.shape[-2]
    pairs = torch.view_as_complex(x[..., front:].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.view_as_complex(turn.contiguous())).flatten(-2)
    return torch.cat((x[..., :front], turned.to(x.dtype)), -1)


def page_rows(table: Tensor, slots: Tensor, entry: Tensor, per: int) -> Tensor:
    """Rows in the pages, int64 [B, n], of entries [n] or [B, n] of the sequences in `slots`."""
    pages = table[slots.clamp_min(0).long()].long()
    entry = entry.expand(pages.shape[0], -1)
    return pages.gather(1, entry // per) * per + entry % per


def _window(tokens: Tokens, memory: Memory) -> tuple[Tensor, Tensor]:
    """The last `span` rows of each sequence, BF16 [B, span, C], and which of them there are."""
    ring = memory.window.per
    at = tokens.positions.long().unsqueeze(1) + torch.arange(1 - memory.span, 1, device=tokens.positions.device)
    rows = memory.window.read(tokens.slots.clamp_min(0).long().unsqueeze(1) * ring + at % ring)
    return _cleared(rows, at >= 0), at >= 0


def _entries(tokens: Tokens, memory: Memory, most: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    assert memory.entries is not None
    if chosen is not None:
        return _cleared(memory.entries.read(chosen.clamp_min(0).long()), chosen >= 0), chosen >= 0
    entry = torch.arange(most // memory.ratio, device=tokens.positions.device)
    rows = memory.entries.read(page_rows(memory.table, tokens.slots, entry, memory.entries.per))
    seen = entry < (tokens.positions.unsqueeze(1) + 1) // memory.ratio
    return _cleared(rows, seen), seen


def _cleared(rows: Tensor, seen: Tensor) -> Tensor:
    """Memory that was never written may hold NaN."""
    return torch.where(seen.unsqueeze(-1), rows, 0.0)
