"""The tuner: measures the candidates for a shape on the GPU at hand and keeps the fastest that is right.

    python -m qpass_kernels.tuning --shapes 4096x4096,14336x4096 --tokens 1,16,64,2048 --kinds w8a8,w4a16

A candidate that does not compile, runs out of memory or registers, or gives another result than the rule's choice is left
out, with a line that says so. What was measured lies in a file for each GPU (measured.py), which every call looks at.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpass_kernels import timing
from qpass_kernels.candidates import candidates
from qpass_kernels.configs import Config, bucket
from qpass_kernels.launch import chip_of
from qpass_kernels.measured import KINDS, known, remember
from qpass_kernels.timing import Times

__all__ = ["candidates", "known", "main", "tune"]

QUICK = 0.02  # seconds for the first look at a candidate
FINAL = 4  # so many of the fastest are measured again, longer
ALIKE = 0.06  # right results differ by less, as a part of their mean square: weights and outputs rounded to bfloat16
Timer = Callable[[Sequence[timing.Call], float], Times]


@dataclass
class Trial:
    """A product to tune: copies of a sample, how to run and time it, what a right result is."""

    samples: list
    run: Callable[[object, Config], Tensor]
    timer: Timer
    say: Callable[[str], None]
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
        from qpass_kernels.samples import errors, exact, some_rows

        y = self.run(self.samples[0], config)
        if self.base is None:
            rows = some_rows(y.shape[0], 8, y.device)
            off = errors(y[rows], exact(self.samples[0], rows)[0])[0]
            if off < ALIKE:
                self.base = y
        else:
            off = errors(y, self.base)[0]
        return None if off < ALIKE else f"wrong result: off by {off:.2g} of the mean square"


def tune(
    kind: str,
    m: int,
    n: int,
    k: int,
    device: torch.device | str = "cuda",
    seconds: float = 20.0,
    report: Callable[[str], None] | None = None,
    timer: Timer | None = None,
    run: Callable[[object, Config], Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Config:
    """Measures the candidates of a product [M, K] x [N, K] for about `seconds`, keeps the winner and returns it.

    The rule's choice is measured first; where the time runs out, those most unlike it are not. timer(calls, seconds) and
    run(sample, config) stand in for CUDA graphs and the kernels in tests. An interrupt keeps the best so far.
    """
    from qpass_kernels import samples  # imports the kernels, which look at `known`

    device, say = torch.device(device), report or (lambda line: None)
    chip = chip_of(device)
    sample = samples.make(kind, m, n, k, device, dtype)
    size = sum(w.nbytes for w in sample.weights if w is not None)
    trial = Trial(sample.copies(timing.copies_of(size, device)), run or samples.run, timer or timing.timed, say)
    tried = candidates(kind, m, n, k, chip)
    try:
        _search(trial, tried, seconds)
    finally:
        if trial.times:
            best = trial.best()
            remember({(kind, bucket(m), n, k): (best, trial.times[best])}, chip)
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


def main(argv: Sequence[str] | None = None, make: Callable[..., Config] = tune) -> int:
    """The command: a line for each shape, number of tokens and kind. Returns 2 without a GPU, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m qpass_kernels.tuning", description="Tunes kernels on this GPU.")
    parser.add_argument("--shapes", type=_shapes, required=True, help="outputs x inputs of the weights: 4096x4096,...")
    parser.add_argument("--tokens", type=_numbers, default=[1, 16, 64, 256, 2048], help="rows of x: 1,16,...")
    parser.add_argument("--kinds", type=_kinds, default=list(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line")
    parser.add_argument("--again", action="store_true", help="measure what is known too")
    parser.add_argument("--verbose", action="store_true", help="say which candidates were left out, and why")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and make is tune:
        print("The tuner measures on a CUDA device, and there is none.", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip, failed = chip_of(device), 0
    for n, k in args.shapes:
        for m in args.tokens:
            for kind in args.kinds:
                head = f"{kind:6} {m:5} x {n} x {k}"
                held = None if args.again else known(kind, m, n, k, chip)
                if held is not None:
                    print(f"{head}  known: {described(held)}", flush=True)
                    continue
                try:
                    found = make(kind, m, n, k, device, args.seconds, print if args.verbose else None)
                    print(f"{head}  {described(found)}", flush=True)
                except KeyboardInterrupt:
                    print(f"{head}  interrupted: what was measured is kept", flush=True)
                    return 130
                except timing.Lost:
                    raise
                except Exception as error:
                    failed = 1
                    print(f"{head}  failed: {timing.reason(error)}", flush=True)
    return failed


def _shapes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        n, _, k = part.partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise argparse.ArgumentTypeError(f"a shape is outputs x inputs, as 4096x4096, not {part!r}")
        found.append((int(n), int(k)))
    return found


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"numbers of tokens are as 1,16,64, not {text!r}")
    return [int(part) for part in text.split(",")]


def _kinds(text: str) -> list[str]:
    unknown = [part for part in text.split(",") if part not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
