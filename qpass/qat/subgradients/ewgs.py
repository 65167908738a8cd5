"""EWGS, element-wise gradient scaling (Lee et al. 2021, 2104.00903): the straight-through gradient, larger or smaller by
where a value lies between two codes.

    dL/dx = dL/dy (1 + delta sign(dL/dy) (v - round(v)))   inside,   else 0         (section 3.2)
    dy/ds                                                  as in LSQ

A gradient that moves a value away from the code it was rounded to is made smaller, one that moves it on larger, so that
values settle at 2 bits. delta: 1e-3, as in the paper's experiments with a fixed one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.qat.subgradients.lsq import start, to_step
from qpass.qat.subgradients.lsq_plus import to_offset
from qpass.qat.subgradients.subgradient import Elements, Subgradient

DELTA = 1e-3


def to_value(e: Elements) -> Tensor:
    """dL/dx of each element."""
    return torch.where(e.inside, e.grad * (1 + DELTA * e.grad.sign() * e.residual), 0.0)


EWGS = Subgradient("ewgs", to_value, to_step, to_offset, start)
