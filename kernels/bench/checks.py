"""Correctness on the GPU at hand: every configuration of every kind against float64, and the same bits each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.cases import judged
from qpass_kernels import samples, timing
from qpass_kernels.candidates import candidates
from qpass_kernels.launch import chip_of
from qpass_kernels.tuning import described

SHAPES = (  # M, N, K: whole tiles, odd ones, split sums, many tokens
    (1, 4096, 4096),
    (16, 14336, 4096),
    (17, 1000, 1056),
    (33, 130, 200),
    (64, 4096, 8192),
    (100, 4096, 4096),
    (300, 1040, 4096),
    (2048, 4096, 4096),
)
TINY = ((3, 48, 256), (17, 33, 200))


def check(
    kinds: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    repeat: int = 3,
    most: int | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Prints a line for each kind and shape; returns how many configurations were wrong, or the rule's that did not run."""
    bad = 0
    for kind in kinds:
        for m, n, k in shapes:
            sample = samples.make(kind, m, n, k, device, dtype)
            tried = candidates(kind, m, n, k, chip_of(device))[:most]
            right, left_out = 0, 0
            for config in tried:
                try:
                    why = _why_wrong(sample, config, repeat)
                except Exception as error:
                    timing.alive(device)
                    left_out += 1
                    say(f"  {kind} {m} x {n} x {k} {described(config)}: did not run: {timing.reason(error)}")
                    bad += config == tried[0]
                    continue
                right += why is None
                if why is not None:
                    bad += 1
                    say(f"  {kind} {m} x {n} x {k} {described(config)}: WRONG: {why}")
            say(f"{kind} {m} x {n} x {k}: {right} of {len(tried)} configurations right, {left_out} did not run")
    return bad


def _why_wrong(sample: samples.Sample, config: object, repeat: int) -> str | None:
    error, allowed = judged(sample, config)
    if not error <= allowed:
        return f"error {error:.2e}, allowed {allowed:.2e}"
    first = samples.run(sample, config)
    for i in range(repeat):
        again = samples.run(sample, config)
        if not torch.equal(first, again):
            return f"run {i + 2} gave other bits in {int((first != again).sum())} places"
    return None
