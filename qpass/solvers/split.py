"""Split the few channels of an activation that reach far beyond the rest, so that one static step suits them all.

    relu(z) = sum_k min(relu(z - kT), T)      k = 0 .. ceil(max/T) - 1

A channel that reaches h becomes ceil(h/T) copies whose preceding bias is lowered by kT, read by copies of its weight
column; the clamp at T is the saturation of the unsigned 8-bit type itself. Exact for ReLU; for GELU off by at most 0.17
in a narrow band around each kT, so the split is made only where the finer step wins more than that loses (`pays`).
(After outlier channel splitting, Zhao et al. 2019, 1901.09504, which halves values instead.) Without it one [CLS] outlier
costs a feed-forward block of a BERT most of its 255 levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

BUDGET = 48  # one channel in so many may be added
STEPS = 40


def copies(high: Tensor) -> tuple[Tensor, float]:
    """(extra copies of each channel, int64 [K]; T): the smallest T whose copies stay within the budget.

    high: float [K], the largest value of each channel.
    """
    budget = max(high.numel() // BUDGET, 1)
    low, top = float(high.max()) / 64, float(high.max())
    if not top > 0:
        return torch.zeros(high.numel(), dtype=torch.int64), 1.0
    for _ in range(STEPS):
        middle = (low + top) / 2
        low, top = (low, middle) if _extra(high, middle).sum() <= budget else (middle, top)
    return _extra(high, top), top


def _extra(high: Tensor, top: float) -> Tensor:
    return ((high / top - 1e-6).ceil() - 1).clamp(min=0).long()


def pays(sample: Tensor, energy: Tensor, limits: tuple[float, float], extra: Tensor, top: float, levels: int) -> bool:
    """Whether the error of a split is less than that of one range for all channels.

    sample: float [rows, K], some values of the activation; limits: the least and largest of all that were seen; energy:
    [K], the squared weights that read each channel. Both errors are of the output: step^2 / 12 for each channel read, and
    what the sum of clamped copies is off on the sample.
    """
    low, high = limits
    whole, parts = (high - low) / levels, (top - low) / levels
    rounding = whole**2 / 12 * float(energy.sum())
    finer = parts**2 / 12 * float((energy * (1 + extra)).sum())
    split = extra > 0
    x = sample[:, split].double()
    rebuilt = x.clamp(max=top)
    before = x if low >= 0 else _before_gelu(x)
    for k in range(1, int(extra.max()) + 1):
        part = functional.relu(before - k * top) if low >= 0 else functional.gelu(before - k * top)
        rebuilt = rebuilt + torch.where(extra[split] >= k, part.clamp(low, top), 0.0)
    off = (rebuilt - x).square().mean(0) * energy[split]
    return finer + float(off.sum()) < rounding


def _before_gelu(x: Tensor) -> Tensor:
    """Z with gelu(z) = x on the rising branch; where x is negative, its turning point stands for z."""
    z = x.clamp(min=-0.7)
    for _ in range(8):
        cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        slope = cdf + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        z = (z - (z * cdf - x) / slope.clamp(min=0.05)).clamp(min=-0.7)
    return z


def layout(extra: Tensor) -> tuple[Tensor, Tensor]:
    """(channel, k) of each added channel, int64: channel j with k = 1 .. extra[j]."""
    channel = torch.repeat_interleave(torch.arange(extra.numel()), extra)
    counts = [torch.arange(1, int(n) + 1) for n in extra[extra > 0]]
    return channel, torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)
