"""Counts of values by their size, channel by channel: 4 bins an octave from 2^-16 to 2^16, for both signs.

    bin 0                 0, and what is smaller than 2^-16
    bin 1 + 4 (e + 16) + q        2^e (1 + q / 4) <= x < 2^e (1 + (q + 1) / 4)
    bin 128 + the same            the same of -x

The bins do not depend on what is counted, so counts add, and a channel's counts say how it looks times any factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 257
SMALLEST = (127 - 16) << 2  # exponent and two bits of the fraction of 2^-16 in float32
HALF = 128
PLACES = 4  # values that stand for those of a bin


def count(rows: Tensor) -> Tensor:
    """Counts, int64 [C, BINS], of float32 values [rows, C]."""
    bits = rows.contiguous().view(torch.int32)
    index = ((bits & 0x7FFFFFFF) >> 21).sub_(SMALLEST - 1).clamp_(0, HALF)
    index += HALF * ((bits < 0) & (index > 0))
    index += BINS * torch.arange(rows.shape[1], dtype=torch.int32)
    return torch.bincount(index.flatten(), minlength=BINS * rows.shape[1]).reshape(-1, BINS)


def places() -> Tensor:
    """Float32 [BINS, PLACES]: values that stand for those of each bin."""
    index = torch.arange(HALF)
    low = 2.0 ** (index // 4 - 16) * (1 + index % 4 / 4)
    width = 2.0 ** (index // 4 - 18)
    positive = low[:, None] + width[:, None] * (torch.arange(PLACES) + 0.5) / PLACES
    return torch.cat([torch.zeros(1, PLACES), positive, -positive])
