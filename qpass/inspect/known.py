"""All that a report is made from: the plan, the graphs, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qpass.inspect.cost import Times
from qpass.inspect.errors import Measured
from qpass.inspect.figures import SiteError
from qpass.plan import Plan
from qpass.served import Record


@dataclass(frozen=True)
class Known:
    """plan: what was decided. records: the graphs captured so far, each with the text that every pass left.

    measured: against the float model, where there was one. model: its class. weights: its parameters, by path.
    bits: path of a nested weight -> those that are read of it now.
    """

    plan: Plan
    records: tuple[Record, ...]
    backend: str
    measured: Measured = field(default_factory=Measured)
    model: str = ""
    times: Times = field(default_factory=Times)
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    bits: Mapping[str, int] = field(default_factory=dict)

    @property
    def errors(self) -> Mapping[str, SiteError]:
        """The error of each site by its name, where they were measured."""
        return self.measured.errors
