"""LSQ, learned step size (Esser et al. 2020, 1902.08153): the step is a parameter.

    dL/dx = dL/dy   inside,   else 0                                                (equation 5)
    dy/ds = round(v) - v   inside,   low below,   high above                        (equation 3)
    s_0   = 2 mean|x| / sqrt(Q_P)                                                   (section 2.1)

low and high are -Q_N and Q_P, here less the offset z, which stays as it is. The sum over the elements of a step is scaled by
1 / sqrt(N Q_P) (section 2.2; fake_quantize.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass import affine
from qpass.qat.blocks import blocked, mean
from qpass.qat.subgradients.subgradient import Elements, Subgradient, clipped
from qpass.qparams import QParams
from qpass.qtype import QType


def to_step(e: Elements) -> Tensor:
    """dL/dy dy/ds of each element."""
    return e.grad * torch.where(e.below, e.low, torch.where(e.above, e.high, -e.residual))


def start(x: Tensor, qtype: QType) -> QParams:
    """The published first step. An unsigned type has offset 0 for values that are nowhere negative, else its middle."""
    negative = bool((x < 0).any())
    top = qtype.qmax if qtype.signed or not negative else (qtype.qmax - qtype.qmin) // 2
    size = mean(blocked(x.detach().float(), qtype).abs(), qtype)
    step = torch.where(size > 0, (2 * size / top**0.5).clamp(min=affine.MIN_SCALE), 1.0)
    zero = None if qtype.symmetric else torch.full_like(step, qtype.qmax - top, dtype=torch.int32)
    return QParams(step, zero, qtype)


LSQ = Subgradient("lsq", clipped, to_step, start=start)
