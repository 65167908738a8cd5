"""PACT (Choi et al. 2018, 1805.06085): inputs of at least 0 are clipped at a learned alpha.

    y = round(clamp(x, 0, alpha) / s) s,   s = alpha / high                         (equations 1, 2)
    dL/dx = dL/dy   inside,   else 0
    dy/dalpha = 1   where x >= alpha,   else 0                                      (equation 3)

so dy/ds = high above, else 0. L2 regularization of alpha (section 3) is the weight decay of steps in `param_groups`. Weights
have the straight-through estimator, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.qat.subgradients.subgradient import Elements, Subgradient, clipped


def to_step(e: Elements) -> Tensor:
    """dL/dy dy/ds of each element."""
    return torch.where(e.above, e.grad * e.high, 0.0)


PACT = Subgradient("pact", clipped, to_step)
