"""A sublayer's output as a sum that its reader makes: a launch less, and ranks wait for each other only there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fathom.kernels.mailbox import Mailbox


class Unsummed(NamedTuple):
    """y [T, D]: the float32 sum of `pairs` in their order, then of `last`, in its dtype; then that of all ranks.

    last [T, D]; pairs float32 [T k, D], the k of a token side by side, or none; box: where the ranks meet, if several.
    """

    last: Tensor
    pairs: Tensor | None = None
    box: Mailbox | None = None


def whole(y: Tensor | Unsummed) -> Tensor:
    """y itself, in a launch for each sum. The same bits."""
    if not isinstance(y, Unsummed):
        return y
    own = y.last
    if y.pairs is not None:
        from fathom.kernels.experts_pairs_triton import combine

        own = combine(y.pairs, len(y.pairs) // len(own), own)
    return y.box.sum(own) if y.box else own
