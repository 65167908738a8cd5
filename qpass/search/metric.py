"""The loss that is searched for: of a model's output against float's, or what a function of the model alone says.

of outputs      `auto`, `kl`, `squared error` or f(output, float output), as qpass/inspect/metric.py has them
of the model    f(model) -> a number; the loss is f(quantized) - f(float)

Which of the two a function is, its parameters say: one without a default is the model. Before anything is measured, float is
evaluated twice: a metric that says two things of one model, is not finite, or raises is an error at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qpass.calibrate import Batch, buffers_kept, call_arguments, evaluating
from qpass.errors import QpassError
from qpass.inspect.metric import Function, Losses, checked_metric, name_of, number_of

SAME = 1e-5  # relative: two runs of one model may add in another order
Model = Callable[[nn.Module], Any]


def of_model(metric: object) -> bool:
    """Whether a metric is a function of the model alone."""
    if not callable(metric):
        return False
    try:
        given = inspect.signature(metric).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    places = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(places) == 1 and not any(p.kind is p.VAR_POSITIONAL for p in given)


def checked(metric: Any, model: nn.Module, batch: Batch) -> tuple[str | Function, float]:
    """The metric as it may be used, and of a function of the model what it says of float; float is evaluated twice."""
    if of_model(metric):
        first, second = (value_of(metric, model, "the float model") for _ in range(2))
        _same(name_of(metric), first, second)
        return metric, first
    chosen = checked_metric(metric)
    args, kwargs = call_arguments(batch, "the first batch")
    losses = Losses(chosen)
    with buffers_kept(model), evaluating(model), torch.no_grad():
        one = model(*args, **kwargs)
    with buffers_kept(model), evaluating(model), torch.no_grad():
        two = model(*args, **kwargs)
    values = []
    for which, output in (("float", one), ("float again", two)):
        losses.add(("the model", which), output, one, None)
        values.append(losses.of("the model", which) or 0.0)
    losses.add(("the model", "float a third time"), one, one, None)
    _same(losses.chosen, values[0], values[1])
    _same(losses.chosen, values[0], losses.of("the model", "float a third time") or 0.0)
    return chosen, 0.0


def value_of(metric: Model, model: nn.Module, what: str) -> float:
    """What a function of the model says, as a finite number."""
    return number_of(metric, f"of {what}", model)


def _same(name: str, first: float, second: float) -> None:
    if abs(first - second) > SAME * max(abs(first), abs(second), SAME):
        raise QpassError(
            f"metric {name} is not deterministic: evaluated twice on the float model it is {first:.6g} and {second:.6g}; "
            "seed what it draws, take the same data in the same order each time, and leave out time and state."
        )
