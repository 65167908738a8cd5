"""What each site does to its numbers: its float input through its quantized product, against its float output.

Sums only, so memory does not grow with the batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.histogram import BINS, edges
from qpass.plan import Decision
from qpass.ranges import Range
from qpass.simulate import scaled_input

PAIRS = 200
MERGED = 8  # bins of a range's histogram that are one of a report's


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of one width between lo and hi."""

    lo: float
    hi: float
    counts: list[int]

    @staticmethod
    def of(values: Range) -> Histogram | None:
        """128 to 256 bins over what a range has seen; None where it has seen nothing."""
        if not values.count or values.histogram is None:
            return None
        counts = values.histogram.reshape(-1, MERGED).sum(1)
        held = counts.nonzero()
        first, last = int(held[0]), int(held[-1])
        at = edges(values.lo, values.hi)
        return Histogram(
            float(at[first * MERGED]),
            float(at[min((last + 1) * MERGED, BINS)]),
            [int(count) for count in counts[first : last + 1]],
        )


@dataclass(frozen=True)
class SiteError:
    """sqnr: 10 log10(power of the float output / power of the error), dB; inf where there is none. worst: largest absolute
    error. cosine: of float output and quantized one. clipped: share of input values beyond the grid by more than half a
    step; None of a float input. scatter: (float, quantized) of the same elements of the output. loss_alone, loss_without:
    at the model's output, when the site alone is quantized, and when it alone is left float.
    """

    site: str
    sqnr: float
    worst: float
    cosine: float = 1.0
    clipped: float | None = None
    histogram: Histogram | None = None
    scatter: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    loss_alone: float | None = None
    loss_without: float | None = None


@dataclass
class Sums:
    """What is counted of one site, batch by batch."""

    decision: Decision
    power: float = 0.0
    noise: float = 0.0
    found: float = 0.0
    dot: float = 0.0
    worst: float = 0.0
    clipped: int = 0
    values: Range = field(default_factory=Range.empty)
    scatter: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add_input(self, x: Tensor) -> None:
        """Counts the values of a site's float input, as they are quantized: with their factors and shifts."""
        real = scaled_input(self.decision, x)
        try:
            self.values = self.values.update(real)
        except QpassError as error:
            raise QpassError(f"{self.decision.site}.input: {error}".replace("calibration value", "a value")) from error
        self.clipped += beyond(self.decision, real)

    def add_output(self, wanted: Tensor, found: Tensor) -> None:
        """Counts the float output and the quantized one, of one shape."""
        if not wanted.numel():
            return
        wanted, found = wanted.float().flatten(), found.float().flatten()
        if not self.scatter[0]:
            at = torch.linspace(0, len(wanted) - 1, min(PAIRS, len(wanted)), dtype=torch.float64).long()
            self.scatter = (wanted[at].tolist(), found[at].tolist())
        error = found - wanted
        self.worst = max(self.worst, float(error.abs().max()))
        self.power += _squares(wanted)
        self.found += _squares(found)
        self.noise += _squares(error)
        self.dot += float((wanted * found).sum(dtype=torch.float64))

    def finish(self) -> SiteError:
        """The figures of the site."""
        sqnr = math.inf if self.noise == 0 else 10 * math.log10(max(self.power, 1e-300) / self.noise)
        length = math.sqrt(self.power * self.found)
        d = self.decision
        return SiteError(
            d.site,
            sqnr,
            self.worst,
            self.dot / length if length else float(self.noise == 0),
            None if d.input_type is None or not self.values.count else self.clipped / self.values.count,
            Histogram.of(self.values),
            self.scatter,
        )

    def like(self, other: Sums) -> None:
        """Takes the input's figures of a site that reads the same value with the same parameters."""
        self.values, self.clipped = other.values, other.clipped


def _squares(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def beyond(d: Decision, x: Tensor) -> int:
    """How many values of a scaled input are beyond the grid of its static type by more than half a step."""
    if d.input_type is None or d.input_scale is None or d.input_type.is_float:
        return 0
    scale, zero = float(d.input_scale), 0 if d.input_zero is None else int(d.input_zero)
    lo, hi = (scale * (q - zero + half) for q, half in ((d.input_type.qmin, -0.5), (d.input_type.qmax, 0.5)))
    reach: float | Tensor = hi  # copies of a channel carry what is beyond the first
    if d.input_extra is not None:
        reach = hi + d.input_extra.to(x) * scale * (d.input_type.qmax - zero)
    return int(((x < lo) | (x > reach)).sum())
