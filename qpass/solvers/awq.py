"""AWQ (Lin et al. 2023, 2306.00978): channels that carry much are made larger in the weight, so that they lose less.

    x'_k = x_k v_k     W'_nk = W_nk / v_k     v_k = mean|x_k|^-a, of mean log 0,  a in 20 steps from 0 to 1

    a* = argmin  tr(E C' E^T) + noise |W' - E|^2,   E = W' - R(W'),  R to nearest (steps.py)     over all weights that read x
    C' = v C v^T with C the second moments of x; noise: of the rounding of x v, where it is rounded (0 where it stays float)

then the clip search: for each scale the part of the limits with the least e C'_g e^T, g the columns that it is the scale of.
Nothing here is of one architecture: the graph says what reads x, and what makes x takes the factor up (passes/migrate.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qpass import affine
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers.smooth import SMALLEST
from qpass.solvers.steps import FEW, PARTS, best_qparams

STEPS = 20
NOT_FREE = "its input is the activation of another linear, where a product has its price: no factor of awq's"


def choose_awq(
    weight: Tensor, moments: Tensor, size: Tensor, qtype: QType, noise: Callable[[Tensor], float] = lambda _: 0.0
) -> Tensor:
    """The factor v [K] of the input of weights [N, K]. moments: [K, K] of the input; size: mean|x| [K]; noise: of a v."""
    size = size.double()
    log = size.clamp(min=max(float(size.max()) * SMALLEST, torch.finfo(torch.float32).tiny)).log()
    log = log - log.mean()
    best, least = torch.ones(len(size)), torch.inf
    for strength in torch.linspace(0, 1, STEPS, dtype=torch.float64):
        v = (-strength * log).exp().float()
        scaled = weight.float() / v
        rounded = affine.fake_quantize(scaled, best_qparams(scaled, qtype))
        off = ((scaled - rounded) * v).double()
        found = float(((off @ moments) * off).sum()) + noise(v) * float(rounded.double().square().sum())
        if found < least:
            best, least = v, found
    return best


def awq(weight: Tensor, moments: Tensor, qtype: QType) -> tuple[Tensor, QParams]:
    """(codes [N, K], parameters): to nearest, clipped where that costs least of what the columns of a scale make."""
    w = weight.float()
    lo, hi = affine.limits(w, qtype)
    params = affine.choose_qparams(lo, hi, qtype)
    size = qtype.group or w.shape[1]
    blocks = torch.stack([moments[i : i + size, i : i + size] for i in range(0, len(moments), size)]).double()
    scale, zero = params.scale, params.zero
    least = torch.full_like(scale, torch.inf, dtype=torch.float64)
    for part in PARTS if qtype.bits <= FEW else PARTS[:1]:
        found = affine.choose_qparams(lo * part, hi * part, qtype)
        off = (affine.fake_quantize(w, found) - w).double().unflatten(1, (-1, size)).transpose(0, 1)  # [G, N, size]
        error = ((off @ blocks) * off).sum(-1).t().reshape(scale.shape)
        scale = torch.where(error < least, found.scale, scale)
        if zero is not None and found.zero is not None:
            zero = torch.where(error < least, found.zero, zero)
        least = torch.minimum(error, least)
    return affine.quantize(w, scale, zero, qtype), QParams(scale, zero, qtype)
