"""A sublayer's output as a sum over ranks that its reader makes: they wait for each other where it is needed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fathom.kernels.mailbox import Mailbox


class Unsummed(NamedTuple):
    """What this rank has of the sum, and how it gets the rest."""

    own: Tensor
    box: Mailbox


def whole(y: Tensor | Unsummed) -> Tensor:
    """The sum, in a launch of its own. The same bits."""
    return y.box.sum(y.own) if isinstance(y, Unsummed) else y
