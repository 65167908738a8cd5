"""Coordinate descent on codes (QuantEase, Behdin et al. 2023, 2309.01885; COMQ, Zhang et al. 2024, 2403.07134).

    f(q, s) = (w - s q) C (w - s q)^T                                  of each output channel; C: moments of what it reads
    q_j <- clamp(round(q_j + ((w - s q) C)_j / (s C_jj)))              the best code for this column, one column after another
    s   <- (w C q^T) / (q C q^T)                                       the best step for these codes

No move makes f larger, so it starts from GPTQ's codes and from several steps, and the best of each channel is kept. Measured
on small CNNs with w4a8, beyond GPTQ: 1 to 4.5 dB at the logits (tests/benchmarks/digits.py). It takes twice GPTQ's own time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.affine import MIN_SCALE
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers.gptq import BLOCK, damped, gptq
from qpass.solvers.steps import FEW

STARTS = (1.0, 0.85, 0.7)  # of the steps of least squared error of the weights: where to start from
SWEEPS = 3


def best_codes(weight: Tensor, moments: Tensor, scale: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """(codes int8, scale) of groups of output channels. weight: [G, n, K]; moments: [G, K, K]; scale: [G, n]; type: iN/c0.

    With more than FEW bits the steps stay what they are: GPTQ's codes, or descent where there are groups.
    """
    smooth = damped(moments)
    smooth = smooth / smooth.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]  # so that float32 holds them
    if qtype.bits > FEW:
        first = _first(weight, moments, scale, qtype)
        codes = first if len(weight) == 1 else descend(weight, smooth, first, scale, qtype, refit=False)[0]
        return codes.to(torch.int8), scale
    count, steps = len(STARTS), torch.cat([scale * part for part in STARTS], 1)
    several = weight.repeat(1, count, 1)
    codes, steps = descend(several, smooth, _first(several, moments, steps, qtype), steps, qtype, refit=True)
    best = error(several, smooth, codes, steps).unflatten(1, (count, -1)).argmin(1, keepdim=True)
    steps = steps.unflatten(1, (count, -1)).gather(1, best).squeeze(1)
    codes = codes.unflatten(1, (count, -1)).gather(1, best[..., None].expand(-1, -1, -1, codes.shape[-1])).squeeze(1)
    return codes.to(torch.int8), steps


def _first(weight: Tensor, moments: Tensor, scale: Tensor, qtype: QType) -> Tensor:
    """Codes to start from: GPTQ's, or to nearest where there are groups, whose columns are few."""
    if len(weight) == 1:
        return gptq(weight[0], moments[0], QParams(scale[0], None, qtype)).unsqueeze(0).float()
    return (weight / scale.unsqueeze(-1)).round().clamp(qtype.qmin, qtype.qmax)


def descend(
    weight: Tensor, moments: Tensor, codes: Tensor, scale: Tensor, qtype: QType, refit: bool
) -> tuple[Tensor, Tensor]:
    """(codes float32, scale) of no more error; shapes as in best_codes. refit: the steps move too."""
    w, c, s, q = weight.float(), moments.float(), scale.float().unsqueeze(-1), codes.float()
    for _ in range(SWEEPS):
        before = q
        q = _sweep(w, c, q, s, qtype)
        if refit:
            s = _refit(w, c, q, s)
        elif torch.equal(before, q):
            break
    return q, s.squeeze(-1)


def error(weight: Tensor, moments: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """F of each output channel, [G, n]."""
    off = weight.double() - codes.double() * scale.double().unsqueeze(-1)
    return ((off @ moments.double()) * off).sum(-1)


def _sweep(w: Tensor, c: Tensor, q: Tensor, s: Tensor, qtype: QType) -> Tensor:
    """The codes after one pass over the columns; (w - s q) C is kept up to date, from block to block by one product."""
    q, pull = q.clone(), (w - s * q) @ c
    for start in range(0, w.shape[-1], BLOCK):
        end = min(start + BLOCK, w.shape[-1])
        within, moved = pull[..., start:end].clone(), torch.zeros_like(q[..., start:end])
        for j in range(start, end):
            level = q[..., j] + within[..., j - start] / (c[..., j, j, None] * s[..., 0])
            level = level.round_().clamp_(qtype.qmin, qtype.qmax)
            moved[..., j - start] = (level - q[..., j]) * s[..., 0]
            q[..., j] = level
            within -= moved[..., j - start, None] * c[..., j, None, start:end]
        pull = pull - moved @ c[..., start:end, :]
    return q


def _refit(w: Tensor, c: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """The step of least error for each row of codes; a row of zeros keeps its own."""
    read = q @ c
    best, size = (read * w).sum(-1, keepdim=True), (read * q).sum(-1, keepdim=True)
    return torch.where((best > 0) & (size > 0), (best / size).clamp(min=MIN_SCALE), s)
