"""Measure the sites of a float model by a plan: each by itself, and what it does to the model's output.

    every batch     float run, each site also in integers beside      sums of each site (figures.py)
                    run with every site quantized                     the loss of all
    alone           one site quantized; all but one                   the losses of each (branches.py, metric.py)

Batches are looked at one by one and forgotten; the iterable may be a generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.calibrate import Batch, buffers_kept, evaluating, shown
from qpass.checks import check_inputs, check_plan_fits
from qpass.errors import QpassError
from qpass.inspect.branches import Assigned, Products, sites_of
from qpass.inspect.figures import SiteError, Sums
from qpass.inspect.metric import Function, Losses
from qpass.inspect.replay import Replay
from qpass.interrupts import heard
from qpass.padding import unpadded
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Decision, Plan
from qpass.source_lines import SourceLine, source_lines

NO_BATCHES = (
    "batches brings nothing to measure on; pass at least one (a generator gives its batches once: make a new one)."
)
ALL = ("", "all")


@dataclass(frozen=True)
class Measured:
    """What a measurement found. errors: by site, in order of execution. loss: with every site quantized."""

    errors: Mapping[str, SiteError] = field(default_factory=dict)
    metric: str | None = None
    loss: float | None = None
    batches: int = 0
    notes: tuple[str, ...] = ()
    sources: Mapping[str, SourceLine] = field(default_factory=dict)


def site_errors(model: nn.Module, plan: Plan, batch: Batch) -> list[SiteError]:
    """The error of each quantized site of the float `model` on a batch, largest first."""
    return sorted(measure(model, plan, [batch]).errors.values(), key=lambda e: e.sqnr)


@heard()
def measure(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    metric: str | Function | None = None,
    alone: bool = False,
) -> Measured:
    """What quantizing by `plan` does to the float `model` on batches. metric: see metric.py; None: sites by themselves only.

    alone: also the loss at the model's output of each site quantized alone, and of all but it. Raises QpassError where the
    plan is of another model, where there is no batch, and where a batch does not fit.
    """
    if model.__dict__.get("_compiled_call_impl") is not None:
        raise QpassError(
            f"the reference {type(model).__name__} is compiled already; pass the float model that was given to qpass.compile."
        )
    check_plan_fits(plan, dict(model.named_parameters(remove_duplicate=False)), type(model).__name__)
    probe = Probe(model, plan, Losses("auto" if metric is None else metric))
    count = 0
    with buffers_kept(model), evaluating(model), torch.no_grad():
        for count, batch in enumerate(shown(batches, "measuring"), 1):
            what = f"batch {count - 1}"
            check_inputs(model, batch, what)
            probe.measure(batch, what, metric is not None, alone)
    if not count:
        raise QpassError(NO_BATCHES)
    return probe.finish(count)


class Probe(Replay):
    """Runs batches in float, each site in integers beside, and with other sites quantized as is asked for."""

    def __init__(self, model: nn.Module, plan: Plan, losses: Losses) -> None:
        self.plan, self.losses, self.products = plan, losses, Products(plan)
        self.sums: dict[str, Sums] = {}
        super().__init__(model)

    def plain(self, graph: fx.GraphModule, nodes: dict[str, fx.Node]) -> fx.Interpreter:
        """Float, and each site in integers beside."""
        return _Beside(graph, nodes, self)

    def measure(self, batch: Batch, what: str, together: bool, alone: bool) -> None:
        """Adds what one batch shows. together: the loss of all sites; alone: also those of each."""
        self.products.forget()
        wanted = self.first(batch, what)
        everything: Assigned = dict.fromkeys(self.products.decisions, self.products)
        if together or alone:
            self.losses.add(ALL, self.quantized(everything, batch, what), wanted, self.mask)
        if alone:
            single: Mapping[Any, Assigned] = {(site, "alone"): {site: self.products} for site in self.sums}
            others: Mapping[Any, Assigned] = {(site, "without"): {site: None} for site in self.sums}
            for base, variants in (({}, single), (everything, others)):
                for key, output in self.variants(batch, what, base, variants):
                    self.losses.add(key, output, wanted, self.mask)

    def finish(self, batches: int) -> Measured:
        """All that was measured."""
        of = self.losses.of
        errors = {
            site: replace(sums.finish(), loss_alone=of(site, "alone"), loss_without=of(site, "without"))
            for site, sums in self.sums.items()
        }
        absent = [site for site in self.products.decisions if site not in self.sums]
        notes = [f"{site} is quantized, but no batch came to it" for site in absent]
        if any(d.is_output for d in self.plan):
            notes.append("losses count the sites; that convolutions leave their values as integers is not part of them")
        if self.plan.attention is not None:
            kind = str(self.plan.attention).removeprefix("torch.")
            notes.append(f"losses count the sites; that attention runs in {kind} is not part of them")
        named = ((name, node) for _, nodes, _ in self.graphs for name, node in nodes.items())
        return Measured(errors, self.losses.chosen or None, of(*ALL), batches, tuple(notes), source_lines(dict(named)))


class _Beside(fx.Interpreter):
    """Runs a graph in float, each site in integers beside, and adds both to the sums of the site."""

    def __init__(self, graph: fx.GraphModule, nodes: dict[str, fx.Node], probe: Probe) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.decided, self.probe = sites_of(nodes, probe.products), probe
        self.last: tuple[fx.Node | None, Sums | None] = (None, None)

    def run_node(self, n: fx.Node) -> Any:
        """One node; a quantized site is also computed in integers' stead."""
        result = super().run_node(n)
        d = self.decided.get(n)
        if d is not None:
            self._add(n, d, result)
        return result

    def _add(self, n: fx.Node, d: Decision, result: Tensor) -> None:
        args, mask = self.fetch_args_kwargs_from_env(n)[0], self.probe.mask
        known = self.probe.sums.setdefault(d.site, Sums(d))
        if d.operation != LOOKUP:
            before, sums = self.last
            if before is n.args[0] and sums is not None and _same_input(sums.decision, d):
                known.like(sums)
            else:
                known.add_input(unpadded(args[0], mask))
            self.last = (n.args[0], known)
        known.add_output(unpadded(result, mask), unpadded(self.probe.products(d, n, args), mask))


def _same_input(a: Decision, b: Decision) -> bool:
    """Whether two sites that read one value see the same of it."""
    bare = all(d.packed.in_mul is None and d.input_shift is None and d.input_extra is None for d in (a, b))
    return bare and a.input_type == b.input_type and a.input_scale is b.input_scale and a.input_zero is b.input_zero
