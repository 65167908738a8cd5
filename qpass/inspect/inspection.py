"""What qpass.inspect does: arguments checked, the float model measured on batches, a Report made of it all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from qpass.bits import bits_of
from qpass.calibrate import Batch
from qpass.errors import QpassError
from qpass.inspect.cost import Times, measure_times
from qpass.inspect.errors import NO_BATCHES, Measured, measure
from qpass.inspect.metric import Function, checked_metric
from qpass.inspect.report import Report
from qpass.runtime import runtime_of


def inspected(
    model: nn.Module,
    reference: nn.Module | None,
    batches: Batch | Iterable[Batch] | None,
    metric: str | Function | None,
    alone: bool,
    times: bool,
) -> Report:
    """The Report; arguments are those of qpass.inspect."""
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
    return Report(
        runtime.plan, tuple(runtime.records), runtime.backend.name, measured, kind, timed, weights, bits_of(model)
    )


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
