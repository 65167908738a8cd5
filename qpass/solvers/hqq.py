"""HQQ (half-quadratic quantization, Badri and Shaji 2023, mobiusml.github.io/hqq_blog): no data, and outliers count less.

    min over s, z of  sum |w - r|^p,  p = 0.7,  r = s (q - z),  q = clamp(round(w / s) + z)          for each scale
    split by half:    e <- shrink(w - r) = sign(w - r) max(|w - r| - |w - r|^(p - 1) / beta, 0),   beta grows
                      z <- round(mean(q - (w - e) / s)),   s <- <w - e, q - z> / <q - z, q - z>

The original moves z alone, a real number, and keeps the step of the limits. Our zero points are integers, and do not move by
a fraction; so here the closed form gives the step as well, from the best part of the lower and of the upper limit. A scale
keeps the iterate, and the start, of least squared error: those of the least norm lost 1.2 times (2 bits) to 1.9 times (3 and
4 bits) as much of a small language model, since with s free the norm favours what is exact for a few weights. beta is of
weights in steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass import affine
from qpass.affine import MIN_SCALE
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers.steps import FEW, least_of

NORM = 0.7
ROUNDS = 20
BETA, GROWTH = 2.0, 1.01  # of weights in units of a step, whose errors are a quarter in the mean
PARTS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of each limit, where it starts from


def hqq(weight: Tensor, moments: Tensor | None, qtype: QType) -> tuple[Tensor, QParams]:
    """(codes [N, K], parameters) of a float weight [N, K], or [K, N] of axis 1. moments: not looked at."""
    del moments
    w = _in_rows(weight.float(), qtype)
    params = _start(weight.float(), qtype)
    s = params.scale.flatten()[:, None]
    z = torch.zeros_like(s) if params.zero is None else params.zero.flatten()[:, None].float()
    s, z = _halves(w, s, z, qtype)
    scale = s.reshape(params.scale.shape)
    zero = None if params.zero is None else z.reshape(params.scale.shape).to(torch.int32)
    return affine.quantize(weight.float(), scale, zero, qtype), QParams(scale, zero, qtype)


def _in_rows(weight: Tensor, qtype: QType) -> Tensor:
    """The weight with one row for each scale."""
    if qtype.group is not None:
        return weight.reshape(-1, qtype.group)
    return weight.t() if qtype.axis == 1 else weight


def _start(weight: Tensor, qtype: QType) -> QParams:
    """The parameters of the parts of the limits with the least error, for each scale."""
    lo, hi = affine.limits(weight, qtype)
    if qtype.bits > FEW:
        return affine.choose_qparams(lo, hi, qtype)
    both = ((a, b) for a in PARTS for b in PARTS if not qtype.symmetric or a == b)
    return least_of(weight, [affine.choose_qparams(lo * low, hi * high, qtype) for low, high in both])


def _halves(w: Tensor, s: Tensor, z: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """Steps and zero points [M, 1] of rows [M, size], each the best of all rounds."""
    best, least, beta = (s, z), torch.full_like(s, torch.inf), BETA
    for _ in range(ROUNDS + 1):
        q = (w / s).round() + z
        level = q.clamp(qtype.qmin, qtype.qmax) - z
        off = w - s * level
        error = off.square().sum(1, keepdim=True)
        better = error < least
        best = (torch.where(better, s, best[0]), torch.where(better, z, best[1]))
        least = torch.where(better, error, least)
        size = (off / s).abs()
        e = off.sign() * s * (size - size.clamp(min=1e-6).pow(NORM - 1) / beta).clamp(min=0)
        if not qtype.symmetric:
            z = (level + z - (w - e) / s).mean(1, keepdim=True).round().clamp(qtype.qmin, qtype.qmax)
            level = ((w / s).round() + z).clamp(qtype.qmin, qtype.qmax) - z
        power = level.square().sum(1, keepdim=True)
        step = ((w - e) * level).sum(1, keepdim=True) / power
        s = torch.where((power > 0) & (step > 0), step.clamp(min=MIN_SCALE), s)
        beta *= GROWTH
    return best
