"""Look at a compiled model: coverage, reasons, errors, costs, the graph at each level, what changed between two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from qpass.calibrate import Batch
    from qpass.inspect.metric import Function
    from qpass.inspect.report import Report


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
    from qpass.inspect.inspection import inspected  # this package is loaded with qpass, what it needs is not

    return inspected(model, reference, batches, metric, alone, times)
