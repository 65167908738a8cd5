"""Codes and steps of channels or groups, better together than one after the other: from GPTQ's, down to a local minimum.

    f(q, s) = (w - r) C (w - r)^T,  r_j = s_g(j) (q_j - z_g(j))      of each output; C: second moments of what it reads
    q_j <- clamp(round(q_j + ((w - r) C)_j / (s_g(j) C_jj)))         the best code for a column, one column after another
    s   <- A^-1 b,  A_gh = a_g C a_h^T,  b_g = a_g C w^T             the best steps for these codes: a_g is (q - z) within g

The first step is QuantEase's (Behdin et al. 2023, 2309.01885), the second a least squares in as many unknowns as a row has
groups. Neither makes f larger. Zero points stay, and so do steps that would turn their sign or become ten times as large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.qtype import QParams
from qpass.solvers.gptq import BLOCK

ROUNDS, SWEEPS = 4, 2
ROOM = 10.0  # how many times larger or smaller a step may become
RIDGE = 1e-6  # of the mean diagonal of A


def refined(weight: Tensor, moments: Tensor, codes: Tensor, params: QParams) -> tuple[Tensor, QParams]:
    """(codes [N, K], parameters) with no larger f. weight: float [N, K]; moments: [K, K], damped; params: of axis 0."""
    size = params.type.group or weight.shape[1]
    c = (moments / moments.diagonal().mean()).float()  # so that float32 holds it
    w, q = weight.float(), codes.float()
    first = params.scale.reshape(len(w), -1).float()
    z = torch.zeros(len(w), 1) if params.zero is None else params.zero.reshape(len(w), -1).float()
    z = z.expand_as(first)
    best, least = (q, first), error(w, c, q, first, z, size)
    s = first
    for _ in range(ROUNDS):
        for _ in range(SWEEPS):
            q = _sweep(w, c, q, s, z, size, params)
        s = _refit(w, c, q, s, z, size, first)
        found = error(w, c, q, s, z, size)
        better = (found < least)[:, None]
        best = (torch.where(better, q, best[0]), torch.where(better, s, best[1]))
        gained = float((least - torch.minimum(found, least)).sum() / least.sum().clamp(min=1e-30))
        least = torch.minimum(found, least)
        if gained < 1e-4:
            break
    scale = best[1].reshape(params.scale.shape).to(params.scale.dtype)
    return best[0].to(params.type.storage), QParams(scale, params.zero, params.type)


def error(w: Tensor, c: Tensor, q: Tensor, s: Tensor, z: Tensor, size: int) -> Tensor:
    """F of each output, [N]."""
    off = (w - _real(q, s, z, size)).double()
    return ((off @ c.double()) * off).sum(-1)


def _real(q: Tensor, s: Tensor, z: Tensor, size: int) -> Tensor:
    return ((q.unflatten(-1, (-1, size)) - z[..., None]) * s[..., None]).flatten(-2)


def _sweep(w: Tensor, c: Tensor, q: Tensor, s: Tensor, z: Tensor, size: int, params: QParams) -> Tensor:
    """The codes after one pass over the columns; (w - r) C is kept up to date, from block to block by one product."""
    lowest, highest = params.type.qmin, params.type.qmax
    q, pull = q.t().contiguous(), ((w - _real(q, s, z, size)) @ c).t().contiguous()  # columns are rows here
    steps = s.t().contiguous()
    for start in range(0, len(q), BLOCK):
        end = min(start + BLOCK, len(q))
        within, moved = pull[start:end], torch.zeros_like(q[start:end])
        for j in range(start, end):
            step = steps[j // size]
            level = (q[j] + within[j - start] / (c[j, j] * step)).round_().clamp_(lowest, highest)
            moved[j - start] = (level - q[j]) * step
            q[j] = level
            within -= c[start:end, j, None] * moved[j - start]
        pull[end:] -= c[end:, start:end] @ moved
    return q.t().contiguous()


def _refit(w: Tensor, c: Tensor, q: Tensor, s: Tensor, z: Tensor, size: int, first: Tensor) -> Tensor:
    """The steps of least error for these codes; rows whose equations have no good answer keep theirs."""
    a = q.unflatten(-1, (-1, size)) - z[..., None]  # [N, G, size]
    read = torch.stack([a[:, g] @ c[g * size : (g + 1) * size] for g in range(a.shape[1])], 1)  # [N, G, K]
    left = torch.einsum("ngkj,nkj->ngk", read.unflatten(-1, (-1, size)), a).double()
    right = (read * w[:, None]).sum(-1).double()
    ridge = RIDGE * left.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)
    left = left + torch.diag_embed(ridge[:, None].expand(-1, left.shape[1]))
    right = right + ridge[:, None] * s.double()
    found, info = torch.linalg.solve_ex(left, right)
    ratio = found / first.double()
    fine = (info == 0)[:, None] & torch.isfinite(ratio) & (ratio > 1 / ROOM) & (ratio < ROOM)
    return torch.where(fine.all(1, keepdim=True), found.float(), s)
