"""Seen: the distribution that calibration saw at a static input, in a few bins: what serving is compared with later.

    bin       0          1             B - 1
         ... ---- e_0 ------ e_1 ... e_{B-2} ----> x        each holds about 1 / PARTS of the values

Cuts lie on edges of the 2048-bin histogram (histogram.py), so these bins are counted exactly. A value that many share (the 0
of a ReLU) gets a bin of its own. Values are those of the float model, without the factors and shifts that the plan moves
onto an input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass import histogram
from qpass.qtype import QType
from qpass.ranges import Range

PARTS = 16


@dataclass(frozen=True, eq=False)
class Seen:
    """edges: float64 [B - 1], ascending. shares: float64 [B], their sum 1. clipped: share of the values beyond the grid."""

    edges: Tensor
    shares: Tensor
    clipped: float = 0.0


def seen_of(values: Range, clipped: float = 0.0) -> Seen | None:
    """The bins of what a Range holds; None where it has no histogram or no values."""
    if values.histogram is None or not int(values.histogram.sum()):
        return None
    counts, edges = values.histogram.double(), histogram.edges(values.lo, values.hi)
    share = counts / counts.sum()
    wanted = torch.arange(1, PARTS, dtype=torch.float64) / PARTS
    cuts = torch.searchsorted(share.cumsum(0), wanted).clamp(max=histogram.BINS - 1) + 1
    heavy = (share > 1 / PARTS).nonzero().flatten()
    cuts = torch.unique(torch.cat([cuts, heavy, heavy + 1]))
    filled = share.nonzero().flatten()
    cuts = cuts[(cuts > filled[0]) & (cuts <= filled[-1])]
    kept = edges[cuts]
    total = counts_in(values, kept)
    return Seen(kept, total / total.sum(), clipped)


def count(x: Tensor, edges: Tensor) -> Tensor:
    """How many of float32 values are in each bin, float64 [B]; as in histogram.py a bin holds the edge nearer to zero."""
    exact = edges.to(torch.float32)
    inner = torch.where(exact < 0, torch.nextafter(exact, torch.tensor(math.inf)), exact).to(x.device)
    index = torch.bucketize(x.flatten(), inner, right=True, out_int32=True)
    return torch.bincount(index, minlength=len(edges) + 1).double().cpu()


def counts_in(values: Range, edges: Tensor) -> Tensor:
    """How many values of a Range are in each bin between `edges`, float64 [B]; a bin that an edge divides, evenly."""
    assert values.histogram is not None
    exponent, first = histogram.layout(values.lo, values.hi)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), values.histogram.double().cumsum(0)])
    place = (edges * math.ldexp(1.0, -exponent) - first).clamp(0, histogram.BINS)
    whole = place.floor().long().clamp(max=histogram.BINS - 1)
    at = below[whole] + (place - whole) * (below[whole + 1] - below[whole])
    return torch.diff(torch.cat([at.new_zeros(1), at, below[-1:]]))


def grid(scale: Tensor, zero: Tensor | None, qtype: QType) -> tuple[float, float]:
    """The limits beyond which a static type clips: half a step outside of its integers, or the largest of its floats."""
    step, middle = float(scale), 0 if zero is None else int(zero)
    half = 0.0 if qtype.is_float else 0.5
    return step * (qtype.qmin - middle - half), step * (qtype.qmax - middle + half)


def clipped_of(values: Range, lo: float, hi: float) -> float:
    """The share of a Range's values outside of lo .. hi, by its histogram; none where all that was seen is inside."""
    if values.histogram is None or not values.count or (values.lo >= lo and values.hi <= hi):
        return 0.0
    below, _, above = counts_in(values, torch.tensor([lo, hi], dtype=torch.float64))
    return float((below + above) / values.histogram.sum().clamp(min=1))
