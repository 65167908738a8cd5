"""The error each site makes by itself: its float input through its quantized product, against its float output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from qpass.calibrate import Batch, Session
from qpass.convolutions import is_convolution
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Decision, Plan
from qpass.simulate import quantized_convolution, quantized_linear


@dataclass(frozen=True)
class SiteError:
    """sqnr: 10 log10(power of the float output / power of the error), dB; inf where there is none."""

    site: str
    sqnr: float
    worst: float


def site_errors(model: nn.Module, plan: Plan, batch: Batch) -> list[SiteError]:
    """The error of each quantized site of the float `model` on a batch, largest first."""
    found: dict[str, SiteError] = {}
    session = _Watch(model, plan, found)
    session.run(batch, "the batch to measure errors on")
    return sorted(found.values(), key=lambda e: e.sqnr)


class _Watch(Session):
    """A session whose graphs measure each site as they run."""

    def __init__(self, model: nn.Module, plan: Plan, found: dict[str, SiteError]) -> None:
        self.plan, self.found = plan, found
        super().__init__(model)

    def interpreter(self, graph: fx.GraphModule, nodes: dict[str, fx.Node]) -> fx.Interpreter:
        """Runs a graph in float, and each site in integers beside."""
        return _Measure(graph, nodes, self.plan, self.found)


class _Measure(fx.Interpreter):
    """Runs a graph in float and compares each quantized site with its float result."""

    def __init__(self, gm: fx.GraphModule, sites: dict[str, fx.Node], plan: Plan, found: dict[str, SiteError]) -> None:
        super().__init__(gm)
        self.sites = {node: name for name, node in sites.items() if node.meta.get("site") == name}
        self.plan, self.found = plan, found

    def run_node(self, n: fx.Node) -> Any:
        """One node; a quantized site is also computed in integers' stead."""
        result = super().run_node(n)
        decision = self.plan.decisions.get(self.sites.get(n, ""))
        if decision is not None and decision.quantized and decision.operation != LOOKUP:  # it multiplies nothing
            x, bias = self.env[n.args[0]], None if n.args[2] is None else self.env[n.args[2]]
            walk = n.args[3:] if is_convolution(n) else None
            y = quantized_convolution(decision, x, bias, walk) if walk else quantized_linear(decision, x, bias)
            self.found[decision.site] = _compare(decision, result, y)
        return result


def _compare(d: Decision, wanted: Tensor, found: Tensor) -> SiteError:
    error = found.double() - wanted.double()
    power, noise = float(wanted.double().square().sum()), float(error.square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(max(power, 1e-300) / noise)
    return SiteError(d.site, sqnr, float(error.abs().max()) if error.numel() else 0.0)
