"""Attention of a query over a set of rows that are key and value at once, with a sink. Reference 2.6."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, rows: Tensor, visible: Tensor | None, sink: Tensor) -> Tensor:
    """One softmax over all `rows` and a value-less sink, for every head of every query.

    q        [T, H, C] queries
    rows     [R, C] rows shared by the queries, or [T, R, C] rows of their own
    visible  [T, R] bool, None when every query sees every row
    sink     [H] float32 logits, not scaled
    returns  [T, H, C] in the dtype of q; logits and sums are float32, probabilities are rounded to q's dtype
    """
    logits = _logits(q, rows)
    if visible is not None:
        logits = logits.masked_fill(~visible.unsqueeze(1), float("-inf"))
    sinks = sink.expand(q.shape[0], -1).unsqueeze(-1)
    weights = torch.cat((logits, sinks), -1).softmax(-1)[..., :-1].to(q.dtype)
    if rows.dim() == 3:
        return weights @ rows
    return (weights.flatten(0, 1) @ rows).unflatten(0, q.shape[:2])


def _logits(q: Tensor, rows: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    if rows.dim() == 3:
        return (q @ rows.transpose(1, 2)).float() * scale
    return (q.flatten(0, 1) @ rows.T).unflatten(0, q.shape[:2]).float() * scale
