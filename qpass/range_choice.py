"""From what was seen at a site to the limits its quantizer gets: minmax, percentile, mse or entropy.

`METHODS` is the table. A method that discards outliers reads the 2048-bin histogram of the Range, never
the values, so its answer depends on the values seen and not on how they were batched or split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpass import histogram
from qpass.affine import choose_qparams, fake_quantize, quantize
from qpass.errors import QpassError, nearest
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.ranges import Range

Limits = tuple[float, float]
Cost = Callable[[Tensor], Tensor]  # float64 [P, 2] candidate limits -> float64 [P]

_COARSE = 2.0 ** (-torch.arange(49, dtype=torch.float64) / 6)  # 1 down to 1/256
_FINE = torch.linspace(0.88, 1.12, 25, dtype=torch.float64)
_POINTS = 4  # a bin is represented by this many points, evenly spread
_EPSILON = 1e-9  # probability given to a bin that the quantized distribution misses


@dataclass(frozen=True)
class Observer:
    """Which statistics a Range must keep: `Range.empty(C if channels else None, histogram)`."""

    channels: bool
    histogram: bool


def observer_for(qtype: QType, method: str = "minmax") -> Observer | None:
    """What a quantizer of `qtype` needs of calibration; None where its scales are computed at run time.

    tensor -> limits, and a histogram unless the method is minmax; channel -> limits per channel;
    token, group -> None.
    """
    name, _, _ = parse_method(method)
    if qtype.granularity in ("token", "sample", "group"):
        return None
    return Observer(channels=qtype.granularity == "channel", histogram=name != "minmax")


def choose_range(range: Range, qtype: QType, method: str = "minmax") -> tuple[Tensor, Tensor]:
    """(lo, hi), float32 and shaped as the scale, for the values in `range` by a method of METHODS."""
    name, function, argument = parse_method(method)
    if range.count == 0:
        raise QpassError("no values were seen here; give calibration batches that reach this site.")
    if qtype.granularity in ("token", "sample", "group"):
        raise QpassError(f"type {qtype} has its scales chosen at run time; a static range is for i8/t or i8/c0.")
    if qtype.granularity == "channel":
        return _channel_limits(range, qtype, name)
    lo, hi = function(range, qtype, argument)
    return torch.tensor(lo, dtype=torch.float32), torch.tensor(hi, dtype=torch.float32)


def _channel_limits(range: Range, qtype: QType, name: str) -> tuple[Tensor, Tensor]:
    if name != "minmax":
        raise QpassError(f"range method {name!r} needs one scale per tensor, not {qtype}; use range=minmax.")
    if range.channels is None:
        raise QpassError(f"type {qtype} needs limits per channel; collect with Range.empty(channels=C).")
    return range.channels.lo, range.channels.hi


def minmax(range: Range, qtype: QType, argument: float | None) -> Limits:
    """Everything seen: nothing is clipped."""
    return range.lo, range.hi


def percentile(range: Range, qtype: QType, argument: float | None) -> Limits:
    """The limits that keep `argument` percent of the values (99.99), discarding as many below as above.

    A limit is the outer edge of the bin in which its quantile falls, so that never too much is discarded.
    """
    counts, edges = _counts(range), histogram.edges(range.lo, range.hi)
    tail = (100.0 - (99.99 if argument is None else argument)) / 200.0 * range.count
    kept_hi = int((counts.cumsum(0) < range.count - tail).sum())
    kept_lo = histogram.BINS - 1 - int((counts.flip(0).cumsum(0) < range.count - tail).sum())
    return max(range.lo, edges[kept_lo].item()), min(range.hi, edges[kept_hi + 1].item())


def mse(range: Range, qtype: QType, argument: float | None) -> Limits:
    """The limits with the least expected squared error, clipping included, over shrinkings of both ends.

    E(lo, hi) = sum over bins of count * mean over the bin of (x - fake_quantize(x; lo, hi))^2
    """
    return _shrink(range, qtype, lambda candidates: _squared_error(range, qtype, candidates))


def expected_error(range: Range, qtype: QType, lo: Tensor, hi: Tensor) -> float:
    """Mean squared error of a value of `range` quantized per tensor between `lo` and `hi`."""
    candidate = torch.stack([lo, hi]).double().unsqueeze(0)
    width = 2.0 ** histogram.layout(range.lo, range.hi)[0] / _POINTS
    return _squared_error(range, qtype, candidate).item() / range.count + width**2 / 12


def entropy(range: Range, qtype: QType, argument: float | None) -> Limits:
    """The limits whose codes tell most about the values: least KL(P || Q) over shrinkings of both ends.

    P: the histogram between the limits, with what lies outside added to the outermost bins. Q: the same bins
    without the outliers, each code's total spread evenly over its bins that P fills. (Migacz, 8-bit inference
    with TensorRT, GTC 2017, with two limits instead of one threshold; as there, a range has at least as many
    bins as the type has levels.)
    """
    return _shrink(range, qtype, lambda candidates: _divergence(range, qtype, candidates))


Method = Callable[[Range, QType, float | None], Limits]
METHODS: tuple[tuple[str, Method], ...] = (
    ("minmax", minmax),
    ("percentile", percentile),
    ("mse", mse),
    ("entropy", entropy),
)


def parse_method(text: str) -> tuple[str, Method, float | None]:
    """(name, function, argument) of `minmax`, `percentile`, `percentile:99.9`, `mse` or `entropy`."""
    name, colon, number = text.partition(":")
    functions = dict(METHODS)
    if name not in functions:
        hint = nearest(name, functions)
        raise QpassError(f"range method {text!r} is not one of {', '.join(functions)}.{hint}")
    if not colon:
        return name, functions[name], None
    try:
        argument = float(number)
    except ValueError:
        argument = -1.0
    if name != "percentile" or not 50.0 < argument <= 100.0:
        raise QpassError(
            f"range method {text!r}: only percentile takes a number, above 50 and up to 100 (percentile:99.9)."
        )
    return name, functions[name], argument


def _counts(range: Range) -> Tensor:
    if range.histogram is None:
        raise QpassError("this range method reads a histogram; collect with Range.empty(histogram=True).")
    return range.histogram


def _shrink(range: Range, qtype: QType, cost: Cost) -> Limits:
    """Limits of least cost: both ends shrunk by one factor, then each end alone; coarsely, then finely.

    Ties go to the wider range. A symmetric type has one limit, so only the joint factor is searched.
    """
    lo, hi = min(range.lo, 0.0), max(range.hi, 0.0)
    if qtype.symmetric:
        lo, hi = min(lo, -hi), max(hi, -lo)
    full = torch.tensor([lo, hi], dtype=torch.float64)
    moves = ((True, True),) if qtype.symmetric else ((True, True), (True, False), (False, True))
    best = full
    for factors, fine in ((_COARSE, False), (_FINE, True)):
        for move in moves:
            moved = factors.unsqueeze(1) * (best if fine else full)
            moved = torch.stack([moved[:, 0].clamp(min=lo), moved[:, 1].clamp(max=hi)], 1)
            candidates = torch.cat([best.unsqueeze(0), torch.where(torch.tensor(move), moved, best)])
            best = candidates[int(cost(candidates).argmin())]
    return best[0].item(), best[1].item()


def _quantizers(qtype: QType, candidates: Tensor) -> QParams:
    rows = replace(qtype, granularity="token", axis=None, group=None)
    return choose_qparams(candidates[:, :1], candidates[:, 1:], rows)


def _squared_error(range: Range, qtype: QType, candidates: Tensor) -> Tensor:
    counts, edges = _counts(range), histogram.edges(range.lo, range.hi)
    filled = counts > 0
    offsets = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    points = edges[:-1][filled].unsqueeze(1) + offsets * (edges[1] - edges[0])
    x = points.flatten().expand(len(candidates), -1)
    error = (fake_quantize(x, _quantizers(qtype, candidates)) - x).square()
    return error @ counts[filled].double().repeat_interleave(_POINTS) / _POINTS


def _divergence(range: Range, qtype: QType, candidates: Tensor) -> Tensor:
    counts, edges = _counts(range).double(), histogram.edges(range.lo, range.hi)
    centres = ((edges[:-1] + edges[1:]) / 2).expand(len(candidates), -1)
    inside = (centres >= candidates[:, :1]) & (centres <= candidates[:, 1:])
    kept = torch.where(inside, counts, 0.0)
    reference = _fold_outliers(kept, inside, counts)
    params = _quantizers(qtype, candidates)
    codes = quantize(centres, params.scale, params.zero, params.type).view(torch.uint8).long()
    table = torch.zeros(len(candidates), 256, dtype=torch.float64)
    filled = ((reference > 0) & inside).double()
    share = table.scatter_add(1, codes, kept) / table.scatter_add(1, codes, filled).clamp(min=1.0)
    quantized = share.gather(1, codes) * filled
    p = reference / reference.sum(1, keepdim=True)
    q = (quantized / quantized.sum(1, keepdim=True).clamp(min=_EPSILON)).clamp(min=_EPSILON)
    divergence = torch.where(p > 0, p * (p / q).log(), 0.0).sum(1)
    return torch.where(inside.sum(1) >= qtype.levels, divergence, torch.inf)


def _fold_outliers(kept: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
    """`kept` with the counts left and right of the window added to its first and last bin."""
    first = inside.int().argmax(1, keepdim=True)
    last = kept.shape[1] - 1 - inside.flip(1).int().argmax(1, keepdim=True)
    below = counts.cumsum(0)
    left = below[first] - counts[first]
    right = below[-1] - below[last]
    return kept.scatter_add(1, first, left).scatter_add(1, last, right)
