"""What calibration has seen: one entry per group of sites that read the same value.

Merging takes in another worker's observations. Count, limits and histograms merge to the last bit; second moments are
float64 sums of float32 batch sums; the sample holds the rows with the smallest hash of their own bits, whoever saw
them first. So the order of batches and workers does not change the plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpass import sizes
from qpass.packing import Packed
from qpass.patches import pixels
from qpass.ranges import Range

SAMPLE = 512  # rows kept of each group
PIXELS = 4096  # of a batch whose channels are counted by size
HASHED = 64  # values of an image that its hash is made of
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of the mean square: below it a variance is noise of float32 sums


Parts = Mapping[int, Mapping[str, Packed]]  # bits -> path of a weight -> it, rounded for these bits alone


@dataclass
class Drift:
    """How far values are from the float model's. moment: float64 [K, K], the sum of (x_float - x) x^T; total: [K], of
    x_float - x.
    """

    moment: Tensor
    total: Tensor

    def add(self, x: Tensor, wanted: Tensor) -> None:
        """One batch, [rows, K] float32 both."""
        off = wanted - x
        self.moment += (off.t() @ x).double()
        self.total += off.sum(0).double()


@dataclass
class Observed:
    """Statistics of one group's input: [rows, K] values seen so far.

    moment: float64 [K, K], the sum of x x^T; of a grouped convolution's patches [G, K / G, K / G]. sample: float32 [<=
    SAMPLE, K], rows chosen by hash; keys: their hashes. sizes: int64 [K, BINS], counts by size (sizes.py).
    """

    range: Range
    rows: int = 0
    moment: Tensor | None = None
    sample: Tensor | None = None
    keys: Tensor | None = None
    sizes: Tensor | None = None
    drift: Drift | None = None

    def add(self, x: Tensor) -> None:
        """One batch, [..., K]."""
        self.range = self.range.update(x)
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self.rows += flat.shape[0]
        if self.moment is not None:
            groups = flat if self.moment.dim() == 2 else flat.unflatten(1, (len(self.moment), -1)).transpose(0, 1)
            self.moment += (groups.mT @ groups).double()  # float32 batch sums in float64: the order does not matter
            self._keep(flat, row_hash(flat))

    def add_drift(self, x: Tensor, wanted: Tensor) -> None:
        """What a batch [..., K] that was added should have been."""
        rows, goal = (t.detach().cpu().reshape(-1, t.shape[-1]).to(torch.float32) for t in (x, wanted))
        if self.drift is None:
            width = rows.shape[1]
            self.drift = Drift(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
        self.drift.add(rows, goal)

    def add_range(self, x: Tensor, axis: int) -> None:
        """One batch of which only the range is kept, with channels on `axis`."""
        self.range = self.range.update(x, axis)
        self.rows += x.numel() // max(x.shape[axis], 1)

    def add_channels(self, x: Tensor) -> None:
        """One batch [B, C, *spatial]: limits of every channel, and how large the values of many pixels are."""
        rows, axes = pixels(x, PIXELS), (0, *range(2, x.dim()))
        self.range = self.range.update(torch.stack([x.amin(axes), x.amax(axes)]))
        self.rows += len(rows)
        counts = sizes.count(rows)
        self.sizes = counts if self.sizes is None else self.sizes + counts

    def merge(self, other: Observed) -> None:
        """Takes in what another worker saw."""
        self.range = self.range.merge(other.range)
        self.rows += other.rows
        if self.moment is not None and other.moment is not None:
            self.moment += other.moment
        if self.sizes is not None and other.sizes is not None:
            self.sizes = self.sizes + other.sizes
        if self.drift is not None and other.drift is not None:
            self.drift = Drift(self.drift.moment + other.drift.moment, self.drift.total + other.drift.total)
        if other.sample is not None and other.keys is not None:
            self._keep(other.sample, other.keys)

    def _keep(self, rows: Tensor, keys: Tensor) -> None:
        if self.sample is not None and self.keys is not None:
            rows, keys = torch.cat([self.sample, rows]), torch.cat([self.keys, keys])
        unique, first = torch.unique(keys, return_inverse=True)
        index = torch.full((len(unique),), len(keys)).scatter_reduce_(0, first, torch.arange(len(keys)), "amin")
        self.keys, self.sample = unique[:SAMPLE], rows[index[:SAMPLE]]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 [K]."""
        assert self.range.channels is not None
        return self.range.channels.total / max(self.rows, 1)

    @property
    def square(self) -> Tensor:
        """Second moments E[x x^T], float64 like moment."""
        assert self.moment is not None
        return self.moment / max(self.rows, 1)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the channels, float64 like moment; what the rounding of the sums may have taken off is added."""
        square = self.square
        mean = self.mean.reshape(*square.shape[:-1], 1)
        width = square.shape[-1]
        rounding = ROUNDING * width**0.5 * float(square.diagonal(dim1=-2, dim2=-1).mean())
        return square - mean @ mean.mT + rounding * torch.eye(width, dtype=square.dtype)


def row_hash(rows: Tensor) -> Tensor:
    """A hash of each row's bits, int64 [rows]: equal rows have equal hashes on every worker."""
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0)) | 1
    mixed = (rows.contiguous().view(torch.int32).to(torch.int64) * factors).sum(1)
    mixed = (mixed ^ (mixed >> 29)) * 0x1F85EBCA6B1D2E35
    return mixed ^ (mixed >> 32)


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """A batch [B, ...] in two halves, by a hash of some values of each image: the same for every worker and order."""
    flat = images.detach().float().flatten(1)
    parity = row_hash(flat[:, :: max(flat.shape[1] // HASHED, 1)]) % 2
    return images[parity == 0], images[parity == 1]


def values_of(site: str) -> str:
    """The name under which the values are observed that a site reads, beside those of its group."""
    return f"{site}.values"


@dataclass
class Observations:
    """Everything calibration has seen of a model: site -> its group, group -> statistics, site -> example rows.

    parts: what the weights became at single widths, where they are to be nested (decide_nested.py).
    """

    groups: dict[str, str] = field(default_factory=dict)
    observed: dict[str, Observed] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    moments: bool = True
    parts: Parts = field(default_factory=dict)

    def merge(self, other: Observations) -> None:
        """Takes in the observations of another worker on the same model."""
        self.groups = other.groups | self.groups
        self.rows = other.rows | self.rows
        for name, theirs in other.observed.items():
            if name in self.observed:
                self.observed[name].merge(theirs)
            else:
                self.observed[name] = theirs

    def values(self, site: str) -> Range | None:
        """The values that a site itself reads, where its group holds others too; else those of the group."""
        found = self.observed.get(values_of(site)) or self.observed.get(self.groups.get(site, site))
        return None if found is None or not found.range.count else found.range

    def together(self, sites: Iterable[str], name: Callable[[str], str] = str) -> Observed | None:
        """What was seen of the inputs of all these sites; name: of a group -> of what is asked for."""
        groups = dict.fromkeys(name(self.groups.get(site, site)) for site in sites)
        found = [self.observed[group] for group in groups if group in self.observed]
        if len(found) < 2:
            return found[0] if found else None
        merged = copy.deepcopy(found[0])
        for other in found[1:]:
            merged.merge(other)
        return merged
