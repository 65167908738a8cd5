"""What is kept of one static input while a model serves: enough to say whether it drifted, and to choose new limits.

    look      one call that was looked at: its histogram goes into `grid` (values as they are quantized) and, where the plan
              moves a factor onto the input, into `raw` (values without it, which is what calibration counted)
    bins      counts in the bins of calibration, and their sums of squares over looks, for the noise of drift.py

All of it adds up, so what several workers saw merges. A look counts at most VALUES values of an input, evenly spread; the
smallest and largest are those of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpass import histogram
from qpass.ranges import Range
from qpass.seen import count

VALUES = 1 << 16


@dataclass
class Bins:
    """Counts c_ib of look i in bin b, n_i of the look: counts, float64 [B], sums c_ib; squares c_ib^2; crossed c_ib n_i;
    total the sum of n_i, and total_square of n_i^2.
    """

    counts: Tensor
    squares: Tensor
    crossed: Tensor
    total: float = 0.0
    total_square: float = 0.0

    @staticmethod
    def empty(bins: int) -> Bins:
        """Nothing counted."""
        return Bins(*(torch.zeros(bins, dtype=torch.float64) for _ in range(3)))

    def plus(self, other: Bins) -> Bins:
        """The sums of both."""
        return Bins(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))  # type: ignore[arg-type]

    def parts(self) -> tuple[Tensor, Tensor, Tensor, float, float]:
        """The five sums."""
        return self.counts, self.squares, self.crossed, self.total, self.total_square

    @staticmethod
    def of(values: Tensor, edges: Tensor) -> Bins:
        """One look."""
        counts = count(values, edges)
        total = float(counts.sum())
        return Bins(counts, counts.square(), counts * total, total, total * total)


@dataclass(frozen=True)
class Stats:
    """looks, samples: calls and their rows on the first axis. below, above: of `values` counted, those beyond the grid.
    grid, raw: Range; raw is None where they are the same. reach: float32 [K], the largest of each channel of a split input.
    bins: None where calibration left no histogram.
    """

    looks: int = 0
    samples: int = 0
    values: int = 0
    below: int = 0
    above: int = 0
    grid: Range = field(default_factory=Range.empty)
    raw: Range | None = None
    reach: Tensor | None = None
    bins: Bins | None = None

    def merge(self, other: Stats) -> Stats:
        """What both saw."""
        raw = self.raw if other.raw is None else other.raw if self.raw is None else self.raw.merge(other.raw)
        bins = self.bins if other.bins is None else other.bins if self.bins is None else self.bins.plus(other.bins)
        reach = self.reach if other.reach is None else other.reach
        if self.reach is not None and other.reach is not None:
            reach = torch.maximum(self.reach, other.reach)
        return Stats(
            self.looks + other.looks,
            self.samples + other.samples,
            self.values + other.values,
            self.below + other.below,
            self.above + other.above,
            self.grid.merge(other.grid),
            raw,
            reach,
            bins,
        )

    @property
    def source(self) -> Range:
        """The values without factors, as calibration counts them."""
        return self.grid if self.raw is None else self.raw

    @property
    def clipped(self) -> float:
        """The share of values beyond the grid."""
        return (self.below + self.above) / max(self.values, 1)


def range_of(x: Tensor, some: Tensor) -> Range:
    """Limits of all values `x`, and the histogram of `some` of them."""
    lo, hi = (limit.item() + 0.0 for limit in torch.aminmax(x))
    if not (math.isfinite(lo) and math.isfinite(hi)):
        raise ValueError(f"values between {lo} and {hi} are not finite")
    return Range(some.numel(), lo, hi, histogram.count(some, lo, hi), None)


def spread(x: Tensor, axis: int, at: float, most: int = VALUES) -> Tensor:
    """Float32 [rows, C]: rows of x, whose channels are on `axis`, evenly spread from a place on that `at` in 0 .. 1 gives."""
    rows = x.movedim(axis, -1).flatten(0, -2) if x.dim() > 1 else x.reshape(1, -1)
    step = max(math.ceil(x.numel() / most), 1)
    return rows[int(at * step) :: step].float()
