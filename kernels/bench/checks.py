"""Correctness on the GPU at hand: every configuration of every kind against float64, and the same bits each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench import convolutions, quantizes
from bench.cases import judged
from qpass_kernels import layers, samples, timing
from qpass_kernels.candidates import candidates, for_convolution
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


def check_layers(
    device: torch.device, dry: bool, repeat: int = 3, most: int | None = None, say: Callable[[str], None] = print
) -> int:
    """The same for convolutions: every configuration of each layer on two images, steps of a code against float64."""
    bad = 0
    for layer in convolutions.DRY_LAYERS if dry else convolutions.LAYERS:
        sample = layers.images(layer, 2, device)
        m, n, c, k = layers.product(layer, 2)
        tried = [None] if layer.is_depthwise else for_convolution(m, n, c, k, layer.groups, chip_of(device))[:most]
        right, left_out, wanted = 0, 0, sample.exact([0, 1]).double()
        for config in tried:
            name = "its rule" if config is None else described(config)
            try:
                y = sample.run(config)
                off = float((y.double() - wanted).abs().max())
                same = all(torch.equal(y, sample.run(config)) for _ in range(repeat))
            except Exception as error:
                timing.alive(device)
                left_out += 1
                bad += config is tried[0]
                say(f"  {layer} {name}: did not run: {timing.reason(error)}")
                continue
            fine = off <= 1 and same
            right += fine
            bad += not fine
            if not fine:
                say(
                    f"  {layer} {name}: WRONG: {off:.0f} steps off, "
                    + ("the same bits" if same else "other bits each time")
                )
        say(f"{layer}: {right} of {len(tried)} configurations right, {left_out} did not run")
    return bad


def check_rows(
    device: torch.device, dtype: torch.dtype, dry: bool, repeat: int = 3, say: Callable[[str], None] = print
) -> int:
    """The same for the quantizes of rows."""
    bad = 0
    for kind in quantizes.QUANTIZES:
        for rows, columns in quantizes.DRY_ROWS if dry else (*quantizes.ROWS, (33, 999), (7, 20000)):
            made = quantizes.ready(kind, rows, columns, device, dtype, True)
            off, allowed = made.judge()
            first = made.calls[0]()
            same = all(torch.equal(a, b) for _ in range(repeat) for a, b in zip(first, made.calls[0](), strict=True))
            fine = off <= allowed and same
            bad += not fine
            say(f"{kind.name} {rows} x {columns}: {off:.2f} steps off" + ("" if fine else ": WRONG"))
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
