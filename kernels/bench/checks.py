"""Correctness on the GPU at hand: every configuration of every kind against float64, and the same bits each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import convolutions, quantizes
from bench.cases import Ready, judged, norm
from qpass_kernels import layers, samples, timing
from qpass_kernels.candidates import candidates, for_convolution
from qpass_kernels.configs import Config
from qpass_kernels.launch import chip_of
from qpass_kernels.layers import Layer
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
ODD_LAYERS = (  # channels and outputs that fill no tile, groups
    *(Layer(20, 33, 3, 2, 13), Layer(24, 40, 1, 1, 9), Layer(6, 14, 5, 1, 11, 2), Layer(64, 64, 3, 1, 14, 2)),
    Layer(20, 20, 5, 2, 13, 20),
)
DRY_LAYERS = (*convolutions.DRY_LAYERS, Layer(6, 14, 3, 1, 5, 2))
ROWS = (*quantizes.ROWS, (33, 999), (7, 20000))
DRY_ROWS = (*quantizes.DRY_ROWS, (3, 99))


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
            tried = [
                (described(config), functools.partial(_why_wrong, sample, config, repeat))
                for config in candidates(kind, m, n, k, chip_of(device))[:most]
            ]
            bad += _counted(f"{kind} {m} x {n} x {k}", tried, device, say)
    return bad


def check_layers(
    device: torch.device, dry: bool, repeat: int = 3, most: int | None = None, say: Callable[[str], None] = print
) -> int:
    """The same for convolutions of two images: as they are called, and every configuration; and for max pools.

    A layer that is called as a matmul adds a residual of codes in the kernel of convolutions.
    """
    bad = 0
    for layer in DRY_LAYERS if dry else (*convolutions.LAYERS, *ODD_LAYERS):
        sample = layers.images(layer, 2, device)
        tried = [("as called", functools.partial(_why_wrong_image, sample, None, repeat))]
        if not layer.is_depthwise:
            held = layers.images(layer, 2, device, True) if layer.is_matmul else sample
            tried += [
                (described(config), functools.partial(_why_wrong_image, held, config, repeat))
                for config in for_convolution(*layers.product(layer, 2), layer.groups, chip_of(device))[:most]
            ]
        bad += _counted(str(layer), tried, device, say)
    for layer in convolutions.DRY_POOLS if dry else convolutions.POOLS:
        run = functools.partial(
            _why_wrong_codes, lambda layer=layer: convolutions.pool(layer, 2, device, torch.int8), repeat
        )
        bad += _counted(convolutions.pool_name(layer), [("as called", run)], device, say)
    return bad


def check_rows(
    device: torch.device, dtype: torch.dtype, dry: bool, repeat: int = 3, say: Callable[[str], None] = print
) -> int:
    """The same for the quantizes of rows, with and without a norm."""
    bad = 0
    for rows, columns in DRY_ROWS if dry else ROWS:
        made = {"norm": functools.partial(norm, rows, columns, device, dtype, True)}
        for kind in quantizes.QUANTIZES:
            made[kind.name] = functools.partial(quantizes.ready, kind, rows, columns, device, dtype, True)
        for name, make in made.items():
            tried = [("as called", functools.partial(_why_wrong_codes, make, repeat))]
            bad += _counted(f"{name} {rows} x {columns}", tried, device, say)
    return bad


def _counted(
    name: str,
    tried: Sequence[tuple[str, Callable[[], str | None]]],
    device: torch.device,
    say: Callable[[str], None],
) -> int:
    """Says what of (label, why it is wrong) was right; returns how many were wrong, the first also where it did not run."""
    right, left_out, bad = 0, 0, 0
    for i, (label, why_wrong) in enumerate(tried):
        try:
            why = why_wrong()
        except Exception as error:
            timing.alive(device)
            left_out += 1
            bad += i == 0
            say(f"  {name} {label}: did not run: {timing.reason(error)}")
            continue
        right += why is None
        if why is not None:
            bad += 1
            say(f"  {name} {label}: WRONG: {why}")
    say(f"{name}: {right} of {len(tried)} configurations right, {left_out} did not run")
    return bad


def _why_wrong(sample: samples.Sample, config: Config, repeat: int) -> str | None:
    error, allowed = judged(sample, config)
    if not error <= allowed:
        return f"error {error:.2e}, allowed {allowed:.2e}"
    return _restless(lambda: (samples.run(sample, config),), repeat)


def _why_wrong_image(sample: layers.Images, config: Config | None, repeat: int) -> str | None:
    off = sample.steps_off(sample.run(config), [0, 1])
    return f"{off:.0f} steps off" if off > 1 else _restless(lambda: (sample.run(config),), repeat)


def _why_wrong_codes(make: Callable[[], Ready], repeat: int) -> str | None:
    made = make()
    error, allowed = made.judge()
    if not error <= allowed:
        return f"{error:.2f} steps off, allowed {allowed:.2f}"
    return _restless(lambda: _tuple(made.calls[0]()), repeat)


def _restless(run: Callable[[], tuple[Tensor, ...]], repeat: int) -> str | None:
    """Which of some more runs gave other bits than the first, if one did."""
    first = run()
    for i in range(repeat):
        for held, again in zip(first, run(), strict=True):
            held, again = (t.view(torch.int8) if t.itemsize == 1 else t for t in (held, again))  # float8 has no equal
            if not torch.equal(held, again):
                return f"run {i + 2} gave other bits in {int((held != again).sum())} places"
    return None


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
