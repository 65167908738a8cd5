"""qpass.monitor: checks what it is given, and begins to watch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from qpass.errors import QpassError
from qpass.runtime import Runtime, runtime_of
from qpass.serving.drift import LOOKS, Limits
from qpass.serving.drifts import SiteDrift
from qpass.serving.monitor import Monitor
from qpass.serving.sampling import Budget

NO_STATIC = (
    "{} has no static input: none of its sites has a scale that was chosen before it runs, so there is nothing that could "
    "drift. Compile it with a static scheme, such as w8a8, and calibration batches."
)


def monitor(
    model: nn.Module,
    *,
    share: float | None = 0.02,
    threshold: float = Limits.psi,
    clipped: float = Limits.clipped,
    window: int = 512,
    on_drift: Callable[[SiteDrift], object] | None = None,
    seed: int = 0,
) -> Monitor:
    """Watches the static inputs of a model that qpass has compiled, while it serves, until `stop()`.

    share: of the time that calls take, what looking at some of them may add to it; None looks at every call. threshold: of
    the population stability index against calibration, beyond the noise of the looks. clipped: share of values beyond the
    grid, more than in calibration. An input beyond one of them drifts; it has come back below half of it. window: looks that
    are judged. on_drift: called from the serving thread with a SiteDrift when an input begins to drift. seed: of the draw of
    calls.
    """
    runtime = compiled(model)
    if not any(d.static for d in runtime.plan):
        raise QpassError(NO_STATIC.format(f"this {type(model).__name__}"))
    if runtime.monitor is not None:
        raise QpassError(f"this {type(model).__name__} is monitored already; stop() that monitor first, or use it.")
    _between("share", share, 0, 1, "of the time of serving; None looks at every call", none=True)
    _between("threshold", threshold, 0, math.inf, "a population stability index; 0.1 is usual")
    _between("clipped", clipped, 0, 1, "of the values of an input")
    if not isinstance(window, int) or isinstance(window, bool) or window < 2 * LOOKS:
        raise QpassError(f"window={window!r}: expected a whole number of looks, at least {2 * LOOKS}.")
    if on_drift is not None and not callable(on_drift):
        raise QpassError(f"on_drift is a {type(on_drift).__name__}; expected a function of one SiteDrift.")
    made = Monitor(model, runtime, Budget(share, seed), Limits(threshold, clipped), window, on_drift)
    runtime.monitor = made
    return made


def compiled(model: nn.Module) -> Runtime:
    """The runtime of a model that qpass has compiled; QpassError for any other."""
    runtime = runtime_of(model) if isinstance(model, nn.Module) else None
    if runtime is None:
        raise QpassError(f"this {type(model).__name__} was not compiled by qpass; pass the result of qpass.compile.")
    return runtime


def _between(name: str, value: Any, low: float, high: float, what: str, none: bool = False) -> None:
    """Checks low < value <= high, finite."""
    if value is None and none:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low < value <= high:
        limit = "" if math.isinf(high) else f" and at most {high}"
        raise QpassError(f"{name}={value!r}: expected a number above {low}{limit}, {what}.")
