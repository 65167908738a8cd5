"""How far a model's output is from float's, as one number: sums that grow batch by batch, one pair for each tensor compared.

squared error   sum (y - y_float)^2 / sum y_float^2, the mean over the float tensors of the output
kl              sum_v p_float (log p_float - log p), p = softmax(logits) over the last axis, the mean over rows, in nats
a function      f(output, float output) -> a number, the mean over batches

`auto` is kl where the output has `logits` by name, else squared error. Rows that the batch's mask calls padding do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpass.errors import QpassError, nearest
from qpass.padding import unpadded

NAMES = ("auto", "kl", "squared error")
ROWS = 256  # of logits at a time
Function = Callable[[Any, Any], Any]
Pairs = list[tuple[float, float]]


def checked_metric(metric: object) -> str | Function:
    """The metric as it may be used: one of NAMES or a function; None stands for `auto`."""
    if metric is None:
        return "auto"
    if callable(metric):
        return metric
    if metric in NAMES:
        return str(metric)
    known = ", ".join(NAMES)
    near = nearest(metric, NAMES) if isinstance(metric, str) else ""
    raise QpassError(
        f"metric={metric!r} is none of {known}, and not a function of (output, float output) that returns a number.{near}"
    )


def name_of(metric: Function) -> str:
    """What a report calls a function."""
    return getattr(metric, "__name__", type(metric).__name__)


@dataclass
class Losses:
    """Losses of several runs against float, each by its key: (site, "alone", "without" or a scheme), or ("", "all")."""

    metric: str | Function
    sums: dict[tuple[str, str], Pairs] = field(default_factory=dict)
    chosen: str = ""

    def add(self, key: tuple[str, str], output: Any, wanted: Any, mask: Tensor | None) -> None:
        """Counts one batch's output."""
        pairs = self._pairs(key, output, wanted, mask)
        known = self.sums.get(key)
        if known is not None and len(known) != len(pairs):
            raise QpassError(
                f"the model's output has {len(pairs)} float tensors in one batch and {len(known)} in others."
            )
        old = known or [(0.0, 0.0)] * len(pairs)
        self.sums[key] = [(a + c, b + d) for (a, b), (c, d) in zip(old, pairs, strict=True)]

    def of(self, site: str, which: str) -> float | None:
        """The loss of a run, None where none was made."""
        pairs = self.sums.get((site, which))
        return sum(a / b if b else float(a > 0) for a, b in pairs) / len(pairs) if pairs else None

    def _pairs(self, key: tuple[str, str], output: Any, wanted: Any, mask: Tensor | None) -> Pairs:
        if not isinstance(self.metric, str):
            self.chosen = name_of(self.metric)
            return [(_value(self.metric, key, output, wanted), 1.0)]
        logits = logits_of(wanted)
        self.chosen = self.metric if self.metric != "auto" else "squared error" if logits is None else "kl"
        found, floats = tensors_of(output), tensors_of(wanted)
        if not floats:
            raise QpassError(
                f"the model's output is a {type(wanted).__name__} without a float tensor in it; pass metric=, a function of "
                "(output, float output) that returns a number."
            )
        if self.chosen == "kl":
            pair = (logits_of(output), logits) if logits is not None else (found[0], floats[0])
            return [_kl(*(unpadded(t, mask) for t in pair))]
        return [_squared(unpadded(a, mask), unpadded(b, mask)) for a, b in zip(found, floats, strict=True)]


def logits_of(output: Any) -> Tensor | None:
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return held if isinstance(held, Tensor) else None


def tensors_of(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _squared(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    error = (found.float() - wanted.float()).square().sum(dtype=torch.float64)
    return float(error), float(wanted.float().square().sum(dtype=torch.float64))


def _kl(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    found, wanted = (t.reshape(-1, t.shape[-1]) for t in (found, wanted))
    total = 0.0
    for a, b in zip(found.split(ROWS), wanted.split(ROWS), strict=True):
        p, q = (torch.log_softmax(t.float(), -1) for t in (b, a))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return max(total, 0.0), float(len(found))


def _value(metric: Function, key: tuple[str, str], output: Any, wanted: Any) -> float:
    site, which = key
    said = {"alone": f"{site} alone quantized", "without": f"{site} alone left float", "all": "all sites quantized"}
    run = f"with {said.get(which, f'{site} alone quantized to {which}')}"
    return number_of(metric, run, output, wanted)


def number_of(metric: Callable[..., Any], what: str, *args: Any) -> float:
    """What a user's function says of its arguments, as a finite number; `what` names the run in an error."""
    place = f"metric {name_of(metric)}, {what}"
    try:
        value = metric(*args)
    except Exception as error:
        raise QpassError(f"{place}: it raised {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise QpassError(f"{place}: it returned a {type(value).__name__}; expected one number.") from error
    if not math.isfinite(number):
        raise QpassError(f"{place}: it returned {number}; expected a finite number.")
    return number
