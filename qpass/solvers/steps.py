"""The steps of a weight: of its largest values where bits are many, of the least squared error where they are few.

    s* = argmin over p in 0.5, 0.52, .. 1  of  sum (w - dequantize(quantize(w; p * limits)))^2      one p for each scale

With 4 bits a channel's or group's step of its largest weight leaves most levels to few values; clipping these costs less
than the finer step gains. With 7 bits and more it does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass import affine
from qpass.qtype import QParams, QType

PARTS = torch.linspace(1.0, 0.5, 26)  # of the limits: candidates for what is kept, the widest first
FEW = 6  # bits up to which clipping pays


def best_qparams(weight: Tensor, qtype: QType) -> QParams:
    """Scales, and zero points of an unsigned type, of a weight [N, K] in channels or groups; float32, as scale_shape says."""
    lo, hi = affine.limits(weight.float(), qtype)
    if qtype.bits > FEW:
        return affine.choose_qparams(lo, hi, qtype)
    return least_error(weight.float(), lo, hi, qtype, PARTS)


def least_error(weight: Tensor, lo: Tensor, hi: Tensor, qtype: QType, parts: Tensor) -> QParams:
    """The parameters of the part of the limits, one part for each scale, with the least squared error."""
    best = affine.choose_qparams(lo * parts[0], hi * parts[0], qtype)
    least = squared_error(weight, best)
    scale, zero = best.scale, best.zero
    for part in parts[1:]:
        found = affine.choose_qparams(lo * part, hi * part, qtype)
        error = squared_error(weight, found)
        scale = torch.where(error < least, found.scale, scale)
        if zero is not None and found.zero is not None:
            zero = torch.where(error < least, found.zero, zero)
        least = torch.minimum(error, least)
    return QParams(scale, zero, qtype)


def squared_error(weight: Tensor, params: QParams) -> Tensor:
    """Squared error of rounding to nearest, clipping included, summed over the values of each scale."""
    error = (affine.fake_quantize(weight, params) - weight).square()
    if params.type.group is not None:
        return error.unflatten(-1, (-1, params.type.group)).sum(-1)
    return error.sum([axis for axis in range(error.dim()) if axis != params.type.axis])
