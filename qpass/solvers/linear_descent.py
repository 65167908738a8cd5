"""Codes and steps of channels or groups, better together than one after the other: from GPTQ's, down to a local minimum.

    f(q, s) = (w - r) C (w - r)^T,  r_j = s_g(j) (q_j - z_g(j))      of each output; C: second moments of what it reads
    q_j <- clamp(round(q_j + ((w - r) C)_j / (s_g(j) C_jj)))         the best code for a column, one column after another
    s   <- A^-1 b,  A_gh = a_g C a_h^T,  b_g = a_g C w^T             the best steps for these codes: a_g is (q - z) within g

The first step is QuantEase's (Behdin et al. 2023, 2309.01885), the second a least squares in as many unknowns as a row has
groups. Neither makes f larger. Zero points stay as they start; so where there are few levels it starts from several parts of
the limits, and the best of each output is kept. Measured on a small language model, KL to float: three quarters to nine
tenths of GPTQ's at 4 and 3 bits, a third at 2 (tests/benchmarks/language.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass import affine
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers.gptq import BLOCK, damped, gptq
from qpass.solvers.steps import best_qparams

ROUNDS, SWEEPS = 4, 2
STARTS = ((0.85, 0.85), (0.7, 0.7), (1.0, 0.8), (0.8, 1.0))  # parts of the lower and the upper limit
SCARCE = 3  # bits up to which it starts from all of them
DAMPING = 0.01  # of the mean of C's diagonal
ROOM = 10.0  # how many times larger or smaller a step may become
GAIN = 1e-3  # of f: with less, a round is the last
RIDGE = 1e-6  # of the mean diagonal of A


def descent(weight: Tensor, moments: Tensor, qtype: QType) -> tuple[Tensor, QParams]:
    """(codes [N, K], parameters) of a float weight [N, K] that reads an input of second moments [K, K]; axis 0 or groups."""
    w = weight.float()
    params = best_qparams(w, qtype)
    if qtype.bits > SCARCE:
        return refined(w, moments, gptq(w, moments, params), params)
    lo, hi = affine.limits(w, qtype)
    starts = [params, *(affine.choose_qparams(lo * low, hi * high, qtype) for low, high in STARTS)]
    several = w.repeat(len(starts), 1)
    zeros = [start.zero for start in starts if start.zero is not None]
    params = QParams(torch.cat([start.scale for start in starts]), torch.cat(zeros) if zeros else None, qtype)
    codes, params = refined(several, moments, gptq(several, moments, params), params)
    return _best(w, moments, codes, params, len(starts))


def _best(w: Tensor, moments: Tensor, codes: Tensor, params: QParams, count: int) -> tuple[Tensor, QParams]:
    """Of `count` answers for each row of w, one below the other, that with the least f."""
    s, z = _by_group(params, len(codes))
    size = params.type.group or w.shape[1]
    found = error(w.repeat(count, 1), damped(moments, DAMPING), codes.float(), s, z, size).reshape(count, -1)
    rows = found.argmin(0) * len(w) + torch.arange(len(w))
    zero = None if params.zero is None else params.zero[rows]
    return codes[rows], QParams(params.scale[rows], zero, params.type)


def refined(weight: Tensor, moments: Tensor, codes: Tensor, params: QParams) -> tuple[Tensor, QParams]:
    """(codes [N, K], parameters) with no larger f than those given."""
    size = params.type.group or weight.shape[1]
    c = damped(moments, DAMPING)
    c = (c / c.diagonal().mean()).float()  # so that float32 holds it
    w, q = weight.float(), codes.float()
    s, z = _by_group(params, len(w))
    best, least = (q, s), error(w, c, q, s, z, size)
    for _ in range(ROUNDS):
        before = least
        for _ in range(SWEEPS):
            q = _sweep(w, c, q, s, z, size, params.type)
        s = _refit(w, c, q, s, z, size)
        found = error(w, c, q, s, z, size)
        better = (found < least)[:, None]
        best = (torch.where(better, q, best[0]), torch.where(better, s, best[1]))
        least = torch.minimum(found, least)
        if float(before.sum() - least.sum()) <= GAIN * float(before.sum()):
            break
    scale = best[1].reshape(params.scale.shape).to(params.scale.dtype)
    return best[0].to(params.type.storage), QParams(scale, params.zero, params.type)


def _by_group(params: QParams, rows: int) -> tuple[Tensor, Tensor]:
    """Steps and zero points as float32 [N, G]."""
    s = params.scale.reshape(rows, -1).float()
    return s, torch.zeros_like(s) if params.zero is None else params.zero.reshape(rows, -1).float()


def error(w: Tensor, c: Tensor, q: Tensor, s: Tensor, z: Tensor, size: int) -> Tensor:
    """F of each output, [N]."""
    off = (w - _real(q, s, z, size)).double()
    return ((off @ c.double()) * off).sum(-1)


def _real(q: Tensor, s: Tensor, z: Tensor, size: int) -> Tensor:
    return ((q.unflatten(-1, (-1, size)) - z[..., None]) * s[..., None]).flatten(-2)


def _sweep(w: Tensor, c: Tensor, q: Tensor, s: Tensor, z: Tensor, size: int, qtype: QType) -> Tensor:
    """The codes after one pass over the columns; (w - r) C is kept up to date, from block to block by one product."""
    q, pull = q.t().contiguous(), ((w - _real(q, s, z, size)) @ c).t().contiguous()  # columns are rows here
    steps = s.t().contiguous()
    for start in range(0, len(q), BLOCK):
        end = min(start + BLOCK, len(q))
        within, moved = pull[start:end], torch.zeros_like(q[start:end])
        for j in range(start, end):
            step = steps[j // size]
            level = (q[j] + within[j - start] / (c[j, j] * step)).round_().clamp_(qtype.qmin, qtype.qmax)
            moved[j - start] = (level - q[j]) * step
            q[j] = level
            within -= c[start:end, j, None] * moved[j - start]
        pull[end:] -= c[end:, start:end] @ moved
    return q.t().contiguous()


def _refit(w: Tensor, c: Tensor, q: Tensor, s: Tensor, z: Tensor, size: int) -> Tensor:
    """The steps of least error for these codes; rows whose equations have no good answer keep theirs."""
    a = q.unflatten(-1, (-1, size)) - z[..., None]  # [N, G, size]
    read = torch.stack([a[:, g] @ c[g * size : (g + 1) * size] for g in range(a.shape[1])], 1)  # [N, G, K]
    left = torch.einsum("nhgj,ngj->nhg", read.unflatten(-1, (-1, size)), a).double()
    right = (read * w[:, None]).sum(-1).double()
    ridge = RIDGE * left.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)[:, None]
    left = left + torch.diag_embed(ridge.expand(-1, left.shape[1]))
    found, info = torch.linalg.solve_ex(left, right + ridge * s.double())
    ratio = found / s.double()
    fine = (info == 0) & torch.isfinite(found).all(1) & ((ratio > 1 / ROOM) & (ratio < ROOM)).all(1)
    return torch.where(fine[:, None], found.float(), s)
