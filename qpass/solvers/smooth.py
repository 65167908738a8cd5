"""Which per-channel factor to move from an input to the weights that read it (SmoothQuant, 2211.10438, eq. 4).

    x'_j = x_j * v_j      W'_nj = W_nj / v_j      v_j = max_n|W_nj|^(1-a) / max|x_j|^a

`a` is not a constant of the method but is chosen per group as the one with the least expected squared output error,
rounding errors taken as uniform and independent (a = 0.5 is the paper's default):

    E = sum_j s^2/12 * |W_:j|^2 / v_j^2   +   sum_nj t_n^2/12 * E[x_j^2] * v_j^2

with s the step of the input and t_n the step of weight row n, both after scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTHS = tuple(i / 20 for i in range(21))
SMALLEST = 1e-5


def factor(lo: Tensor, hi: Tensor, weight: Tensor, strength: float) -> Tensor:
    """v [K] for an input of per-channel limits lo, hi [K] and the weights [N, K] that read it; its mean log is 0."""
    reach = torch.maximum(-lo, hi).clamp(min=0.0).double()
    reach = reach.clamp(min=max(float(reach.max()) * SMALLEST, torch.finfo(torch.float32).tiny))
    rows = weight.abs().amax(0).double()
    rows = rows.clamp(min=max(float(rows.max()) * SMALLEST, torch.finfo(torch.float32).tiny))
    log = (1 - strength) * rows.log() - strength * reach.log()
    return (log - log.mean()).exp().float()


def expected_error(step: float | Tensor, weight_step: Tensor, second: Tensor, weight: Tensor, v: Tensor) -> float:
    """E of the module docstring. step: s, a number or one per channel [K]; weight_step: t [N]; second: E[x_j^2] [K]."""
    v = v.double()
    inputs = (torch.as_tensor(step).double() ** 2 / 12 * weight.double().square().sum(0) / v.square()).sum()
    weights = (weight_step.double().square().sum() / 12) * (second.double() * v.square()).sum()
    return float(inputs + weights)


def choose_factor(lo: Tensor, hi: Tensor, second: Tensor, weight: Tensor, levels: int, weight_levels: int) -> Tensor:
    """The factor of least expected error over STRENGTHS, or all ones where no factor is better."""
    best, best_error = torch.ones_like(lo), _error(lo, hi, second, weight, torch.ones_like(lo), levels, weight_levels)
    for strength in STRENGTHS:
        v = factor(lo, hi, weight, strength)
        error = _error(lo, hi, second, weight, v, levels, weight_levels)
        if error < best_error:
            best, best_error = v, error
    return best


def _error(lo, hi, second, weight, v, levels: int, weight_levels: int) -> float:
    step = ((hi * v).max().clamp(min=0) - (lo * v).min().clamp(max=0)) / (levels - 1)
    weight_step = 2 * (weight / v).abs().amax(1) / (weight_levels - 1)
    return expected_error(step, weight_step, second, weight, v)
