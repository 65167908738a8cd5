"""Look at a compiled model: coverage, reasons, the graph at each level, what changed between two, one site in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qpass.errors import QpassError

if TYPE_CHECKING:
    from qpass.calibrate import Batch
    from qpass.inspect.report import Report


def inspect(model: nn.Module, reference: nn.Module | None = None, batch: Batch | None = None) -> Report:
    """A Report on a model that qpass has compiled: print it, or ask it for a graph, a difference, a site.

    reference, batch: the float model and inputs for it; with them the report also has the error of each site.
    """
    from qpass.inspect.errors import site_errors
    from qpass.inspect.report import Report
    from qpass.runtime import runtime_of

    runtime = runtime_of(model)
    if runtime is None:
        raise QpassError(f"this {type(model).__name__} was not compiled by qpass; pass the result of qpass.compile.")
    errors = {}
    if reference is not None and batch is not None:
        errors = {error.site: error for error in site_errors(reference, runtime.plan, batch)}
    return Report(runtime.plan, tuple(runtime.records), runtime.backend.name, errors)
