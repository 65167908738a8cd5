"""Look at a compiled model: coverage, reasons, the graph at each level, what changed between two, one site in full."""

from __future__ import annotations

from torch import nn

from qpass.errors import QpassError
from qpass.inspect.report import Report
from qpass.runtime import runtime_of


def inspect(model: nn.Module) -> Report:
    """A Report on a model that qpass has compiled: print it, or ask it for a graph, a difference, a site."""
    runtime = runtime_of(model)
    if runtime is None:
        raise QpassError(f"this {type(model).__name__} was not compiled by qpass; pass the result of qpass.compile.")
    return Report(runtime.plan, tuple(runtime.records), runtime.backend.name)
