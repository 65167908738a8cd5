"""Look at a compiled model: coverage, reasons, errors, costs, the graph at each level, what changed between two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from qpass.calibrate import Batch
from qpass.errors import QpassError
from qpass.inspect.errors import Measured, measure
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
) -> Report:
    """A Report on a model that qpass has compiled: print it, or ask it for a graph, a difference, a site, a file.

    reference, batches: the float model and inputs for it, one batch (a tensor, a tuple, a mapping) or an iterable of them;
    with these the report also has the error of each site, and the loss of all sites together at the model's output. Batches
    are looked at one by one and forgotten. metric: `auto` (`kl` where the output has `logits`, else `squared error`), one of
    these, or a function of (output, float output) that returns a number; less is better. alone: also the loss of each site
    quantized alone, and of all but it.
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise QpassError(f"this {type(model).__name__} was not compiled by qpass; pass the result of qpass.compile.")
    if (reference is None) != (batches is None):
        given, lacking = ("batches", "reference") if reference is None else ("reference", "batches")
        raise QpassError(
            f"inspect got {given} without {lacking}; errors are measured with the float model and inputs."
        )
    wanted = checked_metric(metric)
    measured = Measured()
    if reference is not None and batches is not None:
        measured = measure(reference, runtime.plan, listed(batches), wanted, alone)
    elif metric is not None or alone:
        raise QpassError("metric and alone need the float model and batches: qpass.inspect(q, model, batches, ...).")
    return Report(runtime.plan, tuple(runtime.records), runtime.backend.name, measured)


def listed(batches: Batch | Iterable[Batch]) -> Iterable[Batch]:
    """Batches as an iterable: a single one (a tensor, a tuple, a mapping) as a list of one."""
    return [batches] if isinstance(batches, Tensor | tuple | Mapping) else batches
