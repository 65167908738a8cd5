"""Time several calls in turn, so that what drifts (clock, heat, other processes) falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key")
WARM_UP = 3


def median(times: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle (importing `statistics` takes longer than all of this package's
    own small modules).
    """
    ordered, half = sorted(times), len(times) // 2
    return ordered[half] if len(times) % 2 else (ordered[half - 1] + ordered[half]) / 2


def interleaved(
    calls: Mapping[Key, Callable[[], object]], rounds: int, warm_up: int = WARM_UP, burst: int = 1
) -> dict[Key, float]:
    """Median milliseconds of each call: every round runs each once, every other round in reverse order.

    burst: in its turn a call runs so often, and the last run counts: the others leave it neither caches nor a warm-up.

    >>> sorted(interleaved({"a": lambda: None, "b": lambda: sum(range(1000))}, rounds=3))
    ['a', 'b']
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    laps: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(rounds):
        for key in calls if number % 2 == 0 else reversed(list(calls)):
            for _ in range(burst - 1):
                calls[key]()
            start = time.perf_counter()
            calls[key]()
            laps[key].append(time.perf_counter() - start)
    return {key: median(times) * 1e3 for key, times in laps.items()}
