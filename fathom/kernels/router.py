"""From the gate's logits to each token's experts and their shares. Reference 2.10."""

from __future__ import annotations

from torch import Tensor

from fathom.kernels.dispatch import beside
from fathom.kernels.elementwise import softplus


@beside("router_cuda")
def route(
    logits: Tensor, bias: Tensor | None, table: Tensor | None, tokens: Tensor, k: int, factor: float
) -> tuple[Tensor, Tensor]:
    """Expert ids [T, k], largest first, and their float32 shares [T, k], which sum to `factor`.

    logits [T, E] float32. By score: the k largest sqrt(softplus(logits)) + bias [E]; the bias moves the choice only.
    By hash: the rows of `table` [V, k] at the ids `tokens` [T].
    """
    scores = softplus(logits).sqrt()
    if table is None:
        assert bias is not None
        chosen = (scores + bias).topk(k, -1).indices
    else:
        chosen = table[tokens]
    weights = scores.gather(-1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) * factor
