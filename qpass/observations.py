"""What calibration has seen: one entry per group of sites that read the same value.

Merging takes in another worker's observations; count, limits and histograms merge to the last bit, and the second
moments are float64 sums of float32 batch sums, so the order of batches and workers does not change the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpass.ranges import Range


@dataclass
class Observed:
    """Statistics of one group's input: [rows, K] values seen so far. moment: float64 [K, K], the sum of x x^T."""

    range: Range
    rows: int = 0
    moment: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """One batch, [..., K]."""
        self.range = self.range.update(x)
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self.rows += flat.shape[0]
        if self.moment is not None:
            self.moment += (flat.t() @ flat).double()  # float32 batch sums in float64: the order does not matter

    def merge(self, other: Observed) -> None:
        """Takes in what another worker saw."""
        self.range = self.range.merge(other.range)
        self.rows += other.rows
        if self.moment is not None and other.moment is not None:
            self.moment += other.moment


@dataclass
class Observations:
    """Everything calibration has seen of a model: site -> its group, group -> statistics, site -> example rows."""

    groups: dict[str, str] = field(default_factory=dict)
    observed: dict[str, Observed] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    moments: bool = True

    def merge(self, other: Observations) -> None:
        """Takes in the observations of another worker on the same model."""
        self.groups = other.groups | self.groups
        self.rows = other.rows | self.rows
        for name, theirs in other.observed.items():
            if name in self.observed:
                self.observed[name].merge(theirs)
            else:
                self.observed[name] = theirs
