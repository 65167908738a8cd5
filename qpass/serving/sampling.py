"""Which calls are looked at: as many as a share of the time that serving takes pays for, chosen at random.

    due      spent + expected <= share * serving        spent: on looks; expected: what the next will take, by the last ones
    then     one of the next calls, so many as a quarter of those since the last look, drawn evenly

The draw keeps looks from falling on the same call of a rhythm in the traffic. What is spent is below the share at every
moment, as long as looks take what they took before. Calls that capture a graph are no serving.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

FIRST = 16.0  # calls that the first look is taken to cost
WARM = 2  # calls that are not looked at


@dataclass
class Budget:
    """share: of the time of serving that looks may take; None: every call is looked at. Seconds; counts of calls."""

    share: float | None
    seed: int = 0
    serving: float = 0.0
    looking: float = 0.0
    calls: int = 0
    looks: int = 0
    wait: int = -1  # calls until the look that is due; -1: none is
    since: int = 0  # calls since the last look
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Seeds the draw."""
        self.random = random.Random(self.seed)

    def due(self) -> bool:
        """Whether to look at the call that comes; whoever gets True looks."""
        if self.share is None:
            return True
        if self.calls < WARM or not self.lock.acquire(blocking=False):
            return False
        try:
            if self.wait < 0 and self.looking + self._expected() <= self.share * self.serving:
                self.wait = self.random.randrange(max(self.since // 4, 1))
            elif self.wait > 0:
                self.wait -= 1
            return self.wait == 0
        finally:
            self.lock.release()

    def _expected(self) -> float:
        """Seconds of the next look."""
        return self.looking / self.looks if self.looks else FIRST * self.serving / max(self.calls, 1)

    def served(self, seconds: float, looked: float | None = None) -> None:
        """A call took so long, and the look at it, where there was one, so long beside."""
        with self.lock:
            self.calls += 1
            self.since += 1
            self.serving += seconds
            if looked is not None:
                self.looking += looked
                self.looks += 1
                self.wait, self.since = -1, 0
