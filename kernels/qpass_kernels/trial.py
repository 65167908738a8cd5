"""A search among configurations: each is run, compared and timed; what fails or is wrong is left out, and a line says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpass_kernels import samples, timing
from qpass_kernels.configs import Config, bucket
from qpass_kernels.launch import Chip
from qpass_kernels.measured import remember
from qpass_kernels.timing import Times

QUICK = 0.02  # seconds for the first look at a candidate
FINAL = 4  # so many of the fastest are measured again, longer
ALIKE = 0.06  # right results differ by less, as a part of their mean square: weights and outputs rounded to bfloat16
Timer = Callable[[Sequence[timing.Call], float], Times]


@dataclass
class Trial:
    """A product to tune: copies of a sample, how to run and time it, how far a result is from the true one.

    apart: how far two results are from each other; alike: by less than this, in `unit`, where both are right.
    """

    samples: list
    run: Callable[[object, Config], Tensor]
    timer: Timer
    say: Callable[[str], None]
    off: Callable[[Tensor], float]
    apart: Callable[[Tensor, Tensor], float] = lambda y, base: samples.errors(y, base)[0]
    alike: float = ALIKE
    unit: str = "of the mean square"
    base: Tensor | None = None
    times: dict[Config, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the sample lies."""
        return self.samples[0].x.device

    def measure(self, config: Config, seconds: float) -> None:
        """Times a configuration, or says why it is left out."""
        try:
            wrong = self._why_wrong(config)
            if wrong is None:
                found = self.timer([lambda s=s: self.run(s, config) for s in self.samples], seconds)
                self.times[config] = found.median
                return
        except Exception as error:  # whatever a compiler or a driver raises, the next candidate may do
            wrong = timing.reason(error)
        self.times.pop(config, None)
        self.say(f"  left out: {described(config)}: {wrong}")
        timing.alive(self.device)

    def best(self) -> Config:
        """The fastest so far."""
        return min(self.times, key=self.times.__getitem__)

    def _why_wrong(self, config: Config) -> str | None:
        y = self.run(self.samples[0], config)
        off = self.off(y) if self.base is None else self.apart(y, self.base)
        if not off < self.alike:
            return f"wrong result: off by {off:.2g} {self.unit}"
        if self.base is None:
            self.base = y
        return None


def searched(trial: Trial, tried: list[Config], seconds: float, key: tuple[str, int, int, int], chip: Chip) -> Config:
    """Searches, and remembers what was found, after an interrupt too."""
    kind, m, n, k = key
    try:
        _search(trial, tried, seconds)
    finally:
        if trial.times:
            best = trial.best()
            remember({(kind, bucket(m, kind), n, k): (best, trial.times[best])}, chip)
    if not trial.times:
        raise RuntimeError(f"none of {len(tried)} configurations of {kind} {m} x {n} x {k} ran on {chip.name}")
    return best


def _search(trial: Trial, tried: list[Config], seconds: float) -> None:
    until = time.monotonic() + seconds
    for i, config in enumerate(tried):
        if time.monotonic() > until and trial.times:
            trial.say(f"  {len(tried) - i} of {len(tried)} candidates not tried in {seconds:g} s")
            break
        trial.measure(config, QUICK)
    finals = sorted(trial.times, key=trial.times.__getitem__)[:FINAL]
    for config in finals:
        trial.measure(config, 5 * QUICK)
    trial.times = {config: trial.times[config] for config in finals if config in trial.times} or trial.times


def described(config: Config) -> str:
    """A configuration in a few words."""
    if config.how in ("library", "dequantized"):
        return config.how
    text = f"{config.how} {config.bm}x{config.bn}x{config.bk} warps {config.warps} stages {config.stages}"
    return text + (f" band {config.band}" if config.how == "persistent" else f" split {config.split}")
