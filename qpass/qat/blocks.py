"""A value beside its steps: a view with the values of each step along whole axes, and sums over those.

type       view of [.., K]     a step's shape beside it     axes that are summed
i8/t       [.., K]             []                           all
i8/c0      [N, ..]             [N, 1, ..]                   all but axis 0
u4/g128    [.., K / 128, 128]  [.., K / 128, 1]             the last
u8/token   [.., K]             [.., 1]                      the last
u8/sample  [N, ..]             [N, 1, ..]                   all but axis 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass import affine
from qpass.qtype import QType


def blocked(x: Tensor, qtype: QType) -> Tensor:
    """The view."""
    return x if qtype.group is None else torch.unflatten(x, -1, (-1, qtype.group))


def spread(param: Tensor, qtype: QType, ndim: int) -> Tensor:
    """A step or offset, to broadcast against the view of a value of `ndim` axes."""
    return affine.expand(param, qtype, ndim) if qtype.group is None else param.unsqueeze(-1)


def summed(terms: Tensor, qtype: QType) -> Tensor:
    """Sums over the values of each step, of a view's shape -> of the step's."""
    if qtype.group is not None:
        return terms.sum(-1)
    if qtype.granularity in ("token", "sample"):
        return terms.sum(list(range(1, terms.dim())) if qtype.granularity == "sample" else -1, keepdim=True)
    if qtype.axis is None:
        return terms.sum()
    others = [axis for axis in range(terms.dim()) if axis != qtype.axis]
    return terms.sum(others) if others else terms


def mean(terms: Tensor, qtype: QType) -> Tensor:
    """Means over the values of each step."""
    total = summed(terms, qtype)
    return total / (terms.numel() / max(total.numel(), 1))
