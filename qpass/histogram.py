"""Histograms that merge exactly: what a Range keeps of a distribution, in 2048 integer counts.

Bins have width w = 2^e and edges k w with k whole, and e is the smallest exponent at which 2048 bins hold
everything from min(lo, 0) to max(hi, 0). All follows from (lo, hi) alone, and a bin of width 2w is the sum of
two bins of width w:

    w    |  3  |  1  |  4  |  1  |        lo, hi
    2w   |     4     |     5     |        the same values seen by someone with a wider range

so the counts are a function of the values seen, not of the order, the batches or the processes they were seen
in: merging is associative and commutative to the last bit. 1024 or more of the bins span the range.

A bin holds the edge that is nearer to zero, so that float32 finds it exactly: |x| / w rounded towards zero
stays right where it underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 2048
_MIN_EXPONENT = -126  # 2^126 is finite in float32; ranges below 1e-35 share this bin width


def layout(lo: float, hi: float) -> tuple[int, int]:
    """(exponent e, number of the first bin k) of the histogram of values between `lo` and `hi`.

    >>> layout(-1.0, 1.0)
    (-9, -513)
    >>> layout(0.0, 1.0)
    (-10, 0)
    """
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    widest = max(hi, -lo)
    exponent = max(math.frexp(widest)[1] - 12, _MIN_EXPONENT) if widest else _MIN_EXPONENT
    while _bin(hi, exponent) - _bin(lo, exponent) >= BINS:
        exponent += 1
    return exponent, _bin(lo, exponent)


def _bin(value: float, exponent: int) -> int:
    steps = math.trunc(math.ldexp(value, -exponent))
    return steps - 1 if value < 0 else steps


def count(x: Tensor, lo: float, hi: float, weights: Tensor | None = None) -> Tensor:
    """Histogram, int64 [BINS], of the float32 values `x`, all of which lie between `lo` and `hi`.

    weights: how often each is counted, shaped like x; sums are rounded.
    """
    exponent, first = layout(lo, hi)
    x = x.flatten()
    index = (x * 2.0**-exponent).trunc_().sub_((x < 0).float()).sub_(first)
    if weights is not None:
        return torch.bincount(index.to(torch.int16), weights, minlength=BINS).round().long().cpu()
    return torch.bincount(index.to(torch.int16), minlength=BINS).cpu()


def widen(counts: Tensor, old: tuple[float, float], new: tuple[float, float]) -> Tensor:
    """`counts`, laid out for the range `old`, laid out for the range `new` that contains it."""
    (fine, first), (coarse, new_first) = layout(*old), layout(*new)
    shift = min(coarse - fine, 62)
    index = ((torch.arange(BINS) + first) >> shift) - new_first
    return torch.zeros(BINS, dtype=torch.int64).index_add_(0, index.clamp(0, BINS - 1), counts)


def edges(lo: float, hi: float) -> Tensor:
    """The BINS + 1 edges, float64, of the histogram of values between `lo` and `hi`."""
    exponent, first = layout(lo, hi)
    return (torch.arange(BINS + 1, dtype=torch.float64) + first) * 2.0**exponent
