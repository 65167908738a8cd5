"""LSQ+ (Bhalgat et al. 2020, 2004.09576): the offset is learned beside the step.

    dL/dx, dy/ds                 as in LSQ                                          (equations 4, 5)
    dy/dz = 0   inside,   -s   below and above

The paper's offset beta is a real number, y = q s + beta (equation 2), dy/dbeta = 1 outside; integer kernels need a code that
stands for 0, so here beta = -z s with z rounded in the forward pass, straight-through in the backward one. First parameters:
the weights' from mean - 3 sigma and mean + 3 sigma (section 3.2), an input's of the least squared error, which the plan has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass import affine
from qpass.qat.blocks import blocked, mean, spread
from qpass.qat.subgradients.lsq import to_step
from qpass.qat.subgradients.subgradient import Elements, Subgradient, clipped
from qpass.qparams import QParams
from qpass.qtype import QType

SIGMAS = 3


def to_offset(e: Elements) -> Tensor:
    """dL/dy dy/dz of each element."""
    return torch.where(e.inside, 0.0, -e.grad * e.step)


def start(x: Tensor, qtype: QType) -> QParams:
    """Steps of mean - 3 sigma .. mean + 3 sigma of the values of each."""
    wide = blocked(x.detach().float(), qtype)
    middle = mean(wide, qtype)
    sigma = mean((wide - spread(middle, qtype, x.dim())).square(), qtype).sqrt()
    return affine.choose_qparams(middle - SIGMAS * sigma, middle + SIGMAS * sigma, qtype)


LSQ_PLUS = Subgradient("lsq+", clipped, to_step, to_offset, start)
