"""Attention of a query over a set of rows that are key and value at once, with a sink. Reference 2.6."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, rows: Tensor, visible: Tensor | None, sink: Tensor) -> Tensor:
    """One softmax over all `rows` and a value-less sink, for every head of every query.

    q        [..., T, H, C] queries; leading axes are independent problems
    rows     [..., R, C] rows shared by the T queries
    visible  [..., T, R] bool, None when every query sees every row
    sink     [H] float32 logits, not scaled
    returns  [..., T, H, C] in the dtype of q; logits and sums are float32, probabilities are rounded to q's dtype
    """
    heads = q.shape[-3:-1]
    logits = (q.flatten(-3, -2) @ rows.mT).unflatten(-2, heads).float() * q.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible.unsqueeze(-2), float("-inf"))
    sinks = sink.expand(q.shape[:-1]).unsqueeze(-1)
    weights = torch.cat((logits, sinks), -1).softmax(-1)[..., :-1].to(q.dtype)
    return (weights.flatten(-3, -2) @ rows).unflatten(-2, heads)
