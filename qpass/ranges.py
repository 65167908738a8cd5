"""Range: what calibration keeps of one activation site, in memory that does not grow with the batches.

    r = Range.empty()                       # or empty(channels=384): also lo, hi and means per channel
    for x in batches: r = r.update(x)
    r = Range.merge(r, r_of_other_worker)

Merging is associative and commutative to the last bit in count, lo, hi, histogram and per-channel limits, so
a calibration split over processes gives the same plan as one process. The per-channel sums are float64 sums
of batch sums rounded to float32: exact, hence order-free, as long as the batch sums of a channel differ in
size by a factor of less than 2^29 / batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass import histogram
from qpass.errors import QpassError
from qpass.histogram import BINS


@dataclass(frozen=True, eq=False)
class Channels:
    """Statistics per channel of one site: lo, hi float32 [C]; float64 [C] sums of x and |x| over `rows`."""

    rows: int
    lo: Tensor
    hi: Tensor
    total: Tensor
    abs_total: Tensor

    @staticmethod
    def empty(channels: int) -> Channels:
        """No rows seen: merging it changes nothing."""
        inf = torch.full((channels,), math.inf)
        zeros = torch.zeros(channels, dtype=torch.float64)
        return Channels(0, inf, -inf, zeros, zeros)

    @staticmethod
    def of(x: Tensor) -> Channels:
        """Statistics of `x`, float32 [rows, C]."""
        total, abs_total = (v.sum(0, dtype=torch.float64).float().double().cpu() for v in (x, x.abs()))
        return Channels(x.shape[0], x.amin(0).cpu() + 0.0, x.amax(0).cpu() + 0.0, total, abs_total)

    def merge(self, other: Channels) -> Channels:
        """Statistics of the values of both."""
        return Channels(
            self.rows + other.rows,
            torch.minimum(self.lo, other.lo),
            torch.maximum(self.hi, other.hi),
            self.total + other.total,
            self.abs_total + other.abs_total,
        )

    @property
    def absmax(self) -> Tensor:
        """Largest |x| per channel, float32 [C]; 0 where nothing was seen."""
        return torch.maximum(-self.lo, self.hi).clamp(min=0.0)

    @property
    def mean(self) -> Tensor:
        """Mean of x per channel, float32 [C]."""
        return (self.total / max(self.rows, 1)).float()

    @property
    def abs_mean(self) -> Tensor:
        """Mean of |x| per channel, float32 [C]."""
        return (self.abs_total / max(self.rows, 1)).float()


@dataclass(frozen=True, eq=False)
class Range:
    """Statistics of the values seen at one site; the values of an empty one are lo = inf, hi = -inf.

    `histogram` is int64 [2048] laid out as qpass.histogram says, or None where it was not asked for.
    """

    count: int
    lo: float
    hi: float
    histogram: Tensor | None
    channels: Channels | None

    @staticmethod
    def empty(channels: int | None = None, histogram: bool = True) -> Range:
        """Nothing seen yet. With `channels`, statistics per channel are kept too."""
        counts = torch.zeros(BINS, dtype=torch.int64) if histogram else None
        return Range(0, math.inf, -math.inf, counts, None if channels is None else Channels.empty(channels))

    def update(self, x: Tensor, axis: int = -1) -> Range:
        """The range with the values of one batch added; `axis` is the channel axis. NaN or infinity raises."""
        x = x.detach().to(torch.float32)
        if x.numel() == 0:
            return self
        lo, hi = (limit.item() + 0.0 for limit in torch.aminmax(x))  # + 0.0: -0.0 and 0.0 are one value
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise QpassError(f"calibration value is not finite: {first_non_finite(x)}")
        counts = None if self.histogram is None else histogram.count(x, lo, hi)
        channels = None if self.channels is None else self._channels_of(x, axis)
        return self.merge(Range(x.numel(), lo, hi, counts, channels))

    def _channels_of(self, x: Tensor, axis: int) -> Channels:
        assert self.channels is not None
        expected = self.channels.lo.numel()
        if x.ndim == 0 or x.shape[axis] != expected:
            raise QpassError(f"expected {expected} channels on axis {axis}, got a value of shape {tuple(x.shape)}.")
        return Channels.of(x.movedim(axis, -1).reshape(-1, expected))

    def merge(self, other: Range) -> Range:
        """The range of the values of both: `Range.merge(a, b)`."""
        if self._kept() != other._kept():
            raise QpassError(
                f"ranges to merge must keep the same statistics, not {self._kept()} and {other._kept()}; "
                "build both with the same Range.empty(...)."
            )
        lo, hi = min(self.lo, other.lo), max(self.hi, other.hi)
        both = None if self.channels is None or other.channels is None else self.channels.merge(other.channels)
        return Range(self.count + other.count, lo, hi, _merge_counts(self, other, (lo, hi)), both)

    def _kept(self) -> str:
        channels = "no" if self.channels is None else str(self.channels.lo.numel())
        return f"{channels} channels {'without' if self.histogram is None else 'and'} histogram"

    def to_tensors(self) -> dict[str, Tensor]:
        """The whole range as named tensors, for safetensors."""
        out = {"count": torch.tensor(self.count), "limits": torch.tensor([self.lo, self.hi])}
        if self.histogram is not None:
            out["histogram"] = self.histogram
        if (c := self.channels) is not None:
            out |= {"channel_rows": torch.tensor(c.rows), "channel_lo": c.lo, "channel_hi": c.hi}
            out |= {"channel_total": c.total, "channel_abs_total": c.abs_total}
        return out

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Range:
        """The range that `to_tensors` wrote."""
        t = tensors
        missing = sorted({"count", "limits"} - t.keys())
        if missing:
            raise QpassError(f"saved range lacks {', '.join(missing)}; expected what Range.to_tensors writes.")
        channels = None
        if "channel_rows" in t:
            sums = t["channel_total"], t["channel_abs_total"]
            channels = Channels(int(t["channel_rows"]), t["channel_lo"], t["channel_hi"], *sums)
        lo, hi = (limit.item() for limit in t["limits"])
        return Range(int(t["count"]), lo, hi, t.get("histogram"), channels)


def _merge_counts(a: Range, b: Range, limits: tuple[float, float]) -> Tensor | None:
    if a.histogram is None or b.histogram is None:
        return None
    seen = [(r.histogram, (r.lo, r.hi)) for r in (a, b) if r.count and r.histogram is not None]
    return sum((histogram.widen(counts, old, limits) for counts, old in seen), torch.zeros_like(a.histogram))


def first_non_finite(x: Tensor) -> str | None:
    """None where every value is finite, else a sentence: what the first other value is, where, and how many.

    >>> first_non_finite(torch.tensor([[1.0, float("nan")]]))
    'nan at [0, 1] of shape [1, 2]; 1 of 2 values are not finite'
    """
    bad = ~torch.isfinite(x)
    if not bad.any():
        return None
    where = bad.nonzero()
    first = [int(index) for index in where[0]]
    value = x[tuple(first)].item()
    return f"{value} at {first} of shape {list(x.shape)}; {len(where)} of {x.numel()} values are not finite"
