"""Look at a compiled model: coverage, reasons, errors, costs, the graph at each level, what changed between two."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from qpass.calibrate import Batch
from qpass.errors import QpassError
from qpass.inspect.cost import Times, measure_times
from qpass.inspect.errors import NO_BATCHES, Measured, measure
from qpass.inspect.metric import Function, checked_metric
from qpass.inspect.report import Report
from qpass.runtime import runtime_of


def inspect(
    model: nn.Module,
    reference: nn.Module | None = None,
    batches: Batch | Iterable[Batch] | None = None,
    *,
    metric: str | Function | None = None,
    alone: bool = False,
    times: bool = False,
) -> Report:
    """A Report on a model that qpass has compiled: print it, or ask it for a graph, a difference, a site, a file.

    reference, batches: the float model and inputs for it, one batch (a tensor, a tuple, a mapping) or an iterable of them;
    with these the report also has the error of each site, and the loss of all sites together at the model's output. Batches
    are looked at one by one and forgotten. metric: `auto` (`kl` where the output has `logits`, else `squared error`), one of
    these, or a function of (output, float output) that returns a number; less is better. alone: also the loss of each site
    quantized alone, and of all but it. times: also the milliseconds of both models on the first batch, and of each linear by
    itself (see qpass/inspect/cost.py).
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise QpassError(f"this {type(model).__name__} was not compiled by qpass; pass the result of qpass.compile.")
    if (reference is None) != (batches is None):
        given, lacking = ("batches", "reference") if reference is None else ("reference", "batches")
        raise QpassError(f"inspect got {given} without {lacking}; errors are measured with the float model and inputs.")
    wanted = checked_metric(metric)
    measured, timed, weights = Measured(), Times(), {}
    if reference is not None and batches is not None:
        first, several = _first(listed(batches))
        measured = measure(reference, runtime.plan, several, wanted, alone)
        weights = dict(reference.named_parameters(remove_duplicate=False))
        if times:
            timed = measure_times(reference, model, runtime.plan, runtime.backend, first)
    elif metric is not None or alone or times:
        raise QpassError(
            "metric, alone and times need the float model and batches: qpass.inspect(q, model, batches, ...)."
        )
    kind = type(reference or model).__name__
    return Report(runtime.plan, tuple(runtime.records), runtime.backend.name, measured, kind, timed, weights)


def _first(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all of them."""
    several = iter(batches)
    for first in several:
        return first, itertools.chain([first], several)
    raise QpassError(NO_BATCHES)


def listed(batches: Batch | Iterable[Batch]) -> Iterable[Batch]:
    """Batches as an iterable: a single one (a tensor, a tuple, a mapping) as a list of one."""
    if isinstance(batches, Tensor | tuple | Mapping):
        return [batches]
    if not isinstance(batches, Iterable):
        raise QpassError(
            f"batches is a {type(batches).__name__}; expected a tensor, a tuple or a mapping, or an iterable of such."
        )
    return batches
