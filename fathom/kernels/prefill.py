"""A prompt's attention on a device: T queries of one sequence at a time, at positions start .. start + T - 1.

Reference 2.6, 2.8, 2.9. These are the contracts with their references in torch; the GPU's versions stand in
`prefill_read_triton`, `prefill_index_triton` and `prefill_triton`. There a query's bits depend on its position and on
the rows that it sees, not on T, on where the prompt was cut, or on its neighbours.

Names: T queries, H heads, C head dim, h index heads, d index dim, P = rope dims / 2. The query at p sees the rows of
positions p - span + 1 .. p, and entries e < (p + 1) // ratio or those of them that its indexer chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.kernels import quant
from fathom.kernels.decode import page_rows, rotated
from fathom.kernels.dispatch import beside
from fathom.kernels.indexer import index_scores, select_topk
from fathom.kernels.stored import Keys, Rows

_TOGETHER = 64
"""Queries that the references compute at a time: their scratch is bounded."""
_TINY = 2.0**-100


def unpacked(rows: Rows, table: Tensor, slot: int, first: int, count: int) -> Tensor:
    """Entries first .. first + count - 1 of the sequence in `slot` (table int32 [slots, pages]): BF16 [count, C]."""
    return read_rows(table, rows, slot, first, count)


def keys(store: Keys, table: Tensor, slot: int, count: int) -> tuple[Tensor, Tensor]:
    """The first index keys of the sequence in `slot`, laid end to end: e4m3 [n, d] and float32 scales [n].

    Packed FP4 becomes e4m3 with one power of two a key: exactly, unless the key's scales spread over more than 2^14.
    """
    return read_keys(table, store, slot, count)


@beside("prefill_read_triton")
def read_rows(table: Tensor, rows: Rows, slot: int, first: int, count: int) -> Tensor:
    """`unpacked`, in the order that `beside` wants: a tensor first."""
    return rows.read(_index(table, slot, first, count, rows.per))


@beside("prefill_read_triton")
def read_keys(table: Tensor, store: Keys, slot: int, count: int) -> tuple[Tensor, Tensor]:
    """`keys`, likewise."""
    index = _index(table, slot, 0, count, store.per)
    if not store.packed:
        data, scales = (plane.flatten(0, 1)[index] for plane in store.planes)
        return data.view(torch.float8_e4m3fn), scales.squeeze(-1)
    data, scales = store.data.flatten(0, 1)[index], store.scales.flatten(0, 1)[index]
    values = quant.dequantize_fp4(data.view(torch.int8), scales.view(torch.float8_e8m0fnu))
    scale = quant.ceil_pow2(values.abs().amax(-1, keepdim=True).clamp_min(_TINY) / quant.FP8_MAX)
    return (values / scale).to(torch.float8_e4m3fn), scale.squeeze(-1)


@beside("prefill_triton")
def attend(
    q: Tensor,
    near: Tensor,
    entries: Tensor | None,
    chosen: Tensor | None,
    sink: Tensor,
    turn: Tensor,
    start: int,
    ratio: int,
    span: int,
) -> Tensor:
    """Attention over the window, the entries and a sink float32 [H], rotated back to position 0: BF16 [T, H, C].

    q BF16 [T, H, C], normalised and rotated; near BF16 [m + T, C], the rows of positions start - m .. start + T - 1,
    m = min(start, span - 1); entries BF16 [n, C], of which `chosen`, int32 [T, k] in order, -1 behind the last, or all
    that are closed are looked at; turn float32 [T, P, 2]. Logits and sums are float32, probabilities are rounded.
    """
    before = len(near) - len(q)
    out = []
    for first in range(0, len(q), _TOGETHER):
        t = torch.arange(first, min(first + _TOGETHER, len(q)), device=q.device)
        at = (t + before).unsqueeze(1) + torch.arange(1 - span, 1, device=q.device)
        rows, seen = near[at.clamp_min(0)], at >= 0
        if entries is not None and len(entries):
            more, there = _entries(entries, None if chosen is None else chosen[t], (start + t + 1) // ratio)
            rows, seen = torch.cat((rows, more), 1), torch.cat((seen, there), 1)
        out.append(_attended(q[t], rows.float() * seen.unsqueeze(-1), seen, sink))
    return rotated(torch.cat(out), turn.unsqueeze(1) * turn.new_tensor((1.0, -1.0)))


@beside("prefill_index_triton")
def select(q: Tensor, weights: Tensor, keys: Tensor, scales: Tensor, start: int, k: int) -> Tensor:
    """The k best entries of each query, of those that it sees, by the scores sum_h w[t, h] relu(q[t, h] . key[e]):
    int32 [T, k], ascending, -1 behind the last. All while there are no more than k; equal scores go to the lower entry.

    q BF16 [T, h, d], of values on the FP4 grid; weights float32 [T, h], scaled; keys and scales as `keys` gives them.
    """
    values = keys.float() * scales.unsqueeze(1)
    entry = torch.arange(len(keys), device=q.device)
    out = torch.full((len(q), k), -1, dtype=torch.int32, device=q.device)
    for first in range(0, len(q), _TOGETHER):
        x, w = q[first : first + _TOGETHER].float(), weights[first : first + _TOGETHER]
        number = (torch.arange(start + first + 1, start + first + 1 + len(x), device=q.device) // 4).unsqueeze(1)
        kept = select_topk(torch.where(entry < number, index_scores(x, w, values), float("-inf")), k)
        row, chosen = kept.nonzero(as_tuple=True)
        out[first + row, kept.cumsum(1)[row, chosen] - 1] = chosen.int()
    return out


def _index(table: Tensor, slot: int, first: int, count: int, per: int) -> Tensor:
    entry = torch.arange(first, first + count, device=table.device)
    return page_rows(table, torch.tensor([slot], device=table.device), entry, per)[0]


def _entries(entries: Tensor, chosen: Tensor | None, number: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [t, n, C] and which of them a query sees [t, n]."""
    if chosen is not None:
        return entries[chosen.clamp_min(0).long()], chosen >= 0
    seen = torch.arange(len(entries), device=entries.device) < number.unsqueeze(1)
    return entries.expand(len(number), -1, -1), seen


def _attended(q: Tensor, rows: Tensor, seen: Tensor, sink: Tensor) -> Tensor:
    """q [t, H, C] over rows float32 [t, n, C], zero where not seen."""
    logits = (q.float() @ rows.mT) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen.unsqueeze(1), float("-inf"))
    sinks = sink.expand(q.shape[:2]).unsqueeze(-1)
    weights = torch.cat((logits, sinks), -1).softmax(-1)[..., :-1].to(torch.bfloat16)
    return (weights.float() @ rows).to(torch.bfloat16)
