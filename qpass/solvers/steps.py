"""The steps of a weight: of its largest values where bits are many, of the least squared error where they are few.

    s* = argmin over p in 0.5, 0.52, .. 1  of  sum (w - dequantize(quantize(w; p * limits)))^2      one p for each scale

With 4 bits a channel's or group's step of its largest weight leaves most levels to few values; clipping these costs less
than the finer step gains. With 7 bits and more it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass import affine
from qpass.qparams import QParams
from qpass.qtype import QType

PARTS = torch.linspace(1.0, 0.5, 26)  # of the limits: candidates for what is kept, the widest first
FEW = 6  # bits up to which clipping pays
AT_ONCE = 1 << 18  # values whose error is looked at together: a megabyte


def best_qparams(weight: Tensor, qtype: QType) -> QParams:
    """Scales, and zero points of an unsigned type, of a weight [N, K] in channels or groups; float32, as scale_shape says."""
    lo, hi = affine.limits(weight.float(), qtype)
    if qtype.bits > FEW:
        return affine.choose_qparams(lo, hi, qtype)
    return least_error(weight.float(), lo, hi, qtype, PARTS)


def least_error(weight: Tensor, lo: Tensor, hi: Tensor, qtype: QType, parts: Tensor) -> QParams:
    """The parameters of the part of the limits, one part for each scale, with the least squared error."""
    return least_of(weight, [affine.choose_qparams(lo * part, hi * part, qtype) for part in parts])


def least_of(weight: Tensor, candidates: Sequence[QParams]) -> QParams:
    """For each scale its candidate with the least squared error of the values it scales; of equals, the first."""
    best, zero = candidates[0].scale, candidates[0].zero
    errors = _errors(_by_scale(weight, candidates[0].type), candidates)
    least = errors[0]
    for error, found in zip(errors[1:], candidates[1:], strict=True):
        better = error < least
        best = torch.where(better, found.scale, best)
        if zero is not None and found.zero is not None:
            zero = torch.where(better, found.zero, zero)
        least = torch.minimum(error, least)
    return QParams(best, zero, candidates[0].type)


def squared_error(weight: Tensor, params: QParams) -> Tensor:
    """Squared error of rounding to nearest, clipping included, summed over the values of each scale."""
    return _errors(_by_scale(weight, params.type), [params])[0].square()


def _by_scale(weight: Tensor, qtype: QType) -> Tensor:
    """The values of each scale on a last axis, behind those of the scale: a view where that is possible."""
    if qtype.group is not None:
        return weight.unflatten(-1, (-1, qtype.group))
    return weight.flatten() if qtype.axis is None else weight.movedim(qtype.axis, 0).flatten(1)


def _errors(values: Tensor, candidates: Sequence[QParams]) -> Tensor:
    """Root of the squared error of each candidate and scale: [P, *scale]. values: [*scale, n].

    All candidates of a few values, which stay in the cache: to and from memory a value goes once.
    """
    qtype = candidates[0].type
    scale = torch.stack([c.scale for c in candidates]).unsqueeze(-1)
    inverse, low, high = 1 / scale, torch.tensor(float(qtype.qmin)), torch.tensor(float(qtype.qmax))
    if candidates[0].zero is not None:
        zero = torch.stack([c.zero for c in candidates if c.zero is not None]).float().unsqueeze(-1)
        low, high = qtype.qmin - zero, qtype.qmax - zero
    low, high = low.to(values.device).expand_as(scale), high.to(values.device).expand_as(scale)
    if values.dim() == 1:
        return torch.stack([_norm(values, *each) for each in zip(inverse, low, high, strict=True)]) * scale[:, 0]
    found = torch.empty_like(scale)
    rows = max(1, AT_ONCE // max(1, values[0].numel()))
    for start in range(0, len(values), rows):
        some = slice(start, start + rows)
        few = values[some].contiguous()
        for number in range(len(candidates)):
            found[number, some, ..., 0] = _norm(few, inverse[number, some], low[number, some], high[number, some])
    return (found * scale).squeeze(-1)


def _norm(values: Tensor, inverse: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Root of the sum of squares of what rounding takes from values, over the last axis, in units of the step."""
    exact = values * inverse
    code = torch.round(exact)
    torch.maximum(code, low, out=code)
    torch.minimum(code, high, out=code)
    return torch.linalg.vector_norm(code.sub_(exact), dim=-1)
