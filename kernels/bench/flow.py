"""The flow of a run: shape by shape, what fails as a row that says why."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import cases, convolutions, quantizes, tables
from bench.clocks import Ceilings, DryClock, GraphClock, ceilings
from bench.peers import PEERS
from bench.tables import Row
from qpass_kernels import layers, timing
from qpass_kernels.launch import chip_of
from qpass_kernels.layers import Layer
from qpass_kernels.measured import KINDS, known
from qpass_kernels.tuning import tune, tune_layer

DRY_GOALS = {(64, 128, 2): {"w8a8": 1.75, "w4a16": 0.5}, (64, 128, 40): {"w4a8": 1.5}}
DRY_NORMS = ((8, 64),)
Maker = tuple[Row, Callable[[], cases.Ready]]


def dtype_of(dry: bool) -> torch.dtype:
    """The plain path's: bfloat16, or float16 in a dry run, whose interpreter multiplies no bfloat16."""
    return torch.float16 if dry else torch.bfloat16


def measured(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, str]]:
    """All rows of a run, and what it was made on. A lost CUDA context ends it early, and `stopped` says so."""
    clock = DryClock() if args.dry else GraphClock(device, args.seconds)
    about = tables.machine(device)
    tops = ceilings(clock, device, **({"size": 64, "length": 1 << 16} if args.dry else {}))
    about["copy"] = f"{tops.copy / 1e9:.0f} GB/s"
    for name, rate in tops.rates.items():
        about[name] = f"{rate / 1e12:.0f} T/s" if rate else f"failed: {tops.why_not[name]}"
    rows: list[Row] = []
    try:
        _everything(args, clock, tops, device, rows)
    except (timing.Lost, torch.AcceleratorError, KeyboardInterrupt) as error:
        tables.end(rows, "failed: the run was stopped before it")
        about["stopped"] = f"after {sum(row.us is not None for row in rows)} times: {timing.reason(error)}"
        print(about["stopped"], file=sys.stderr)
    return rows, about


def _everything(args: argparse.Namespace, clock: Any, tops: Ceilings, device: torch.device, rows: list[Row]) -> None:
    dtype = dtype_of(args.dry)
    goals = DRY_GOALS if args.dry else cases.GOALS
    kinds = [kind for kind in args.kinds if kind in KINDS]
    for n, k, m in goals:
        if kinds and (not args.only or f"{n}x{k}" in args.only):
            for kind in kinds if args.tune else ():
                _tuned(args, (kind, m, n, k), functools.partial(tune, kind, m, n, k), device)
            products(m, n, k, goals[n, k, m], kinds, args, clock, tops, device, rows)
    if args.only:
        return
    if "rows" in args.kinds:
        for m, k in DRY_NORMS if args.dry else cases.NORMS:
            norms(m, k, clock, tops, device, dtype, rows)
        for m, k in quantizes.DRY_ROWS if args.dry else quantizes.ROWS:
            codes(m, k, clock, tops, device, dtype, rows)
    if "conv" in args.kinds:
        _images(args, clock, tops, device, rows)


def _images(args: argparse.Namespace, clock: Any, tops: Ceilings, device: torch.device, rows: list[Row]) -> None:
    batch, dtype = 2 if args.dry else convolutions.BATCH, dtype_of(args.dry)
    for layer in convolutions.DRY_LAYERS if args.dry else convolutions.LAYERS:
        if args.tune and layer.is_matmul:
            m, n, _, k = layers.product(layer, batch)
            _tuned(args, ("w8a8", m, n, k), functools.partial(tune, "w8a8", m, n, k), device)
        elif args.tune and not layer.is_depthwise:
            _tuned(args, layers.key(layer, batch), functools.partial(tune_layer, layer, batch), device)
        convolution(layer, batch, clock, tops, device, dtype, rows)
    for layer in convolutions.DRY_POOLS if args.dry else convolutions.POOLS:
        pool(layer, batch, clock, tops, device, dtype, rows)


def products(
    m: int,
    n: int,
    k: int,
    goals: dict[str, float],
    kinds: Sequence[str],
    args: argparse.Namespace,
    clock: Any,
    tops: Ceilings,
    device: torch.device,
    rows: list[Row],
) -> None:
    """Adds the rows of one product: the plain path, ours, the peers; graphs of all are replayed in turn."""
    given = cases.problem(m, n, k, device, dtype_of(args.dry))
    head = f"{n}x{k}", m
    makers = [(Row(*head, "bf16", "torch F.linear"), functools.partial(cases.baseline, given))]
    for kind in kinds:
        for quantize in (True, False) if kind in cases.QUANTIZED else (False,):
            row = Row(*head, kind, "qpass" if quantize or kind not in cases.QUANTIZED else "qpass, without quantize")
            if row.by == "qpass" and kind in goals:
                row.goal = f"{goals[kind]:.2f} x"
            makers.append((row, functools.partial(cases.ours, kind, quantize, given)))
    for peer in PEERS:
        if peer.scheme in kinds and not args.no_peers:
            makers.append((Row(*head, peer.scheme, peer.name), functools.partial(cases.theirs, peer, given)))
    rows += [row for row, _ in makers]
    timed(makers, clock, tops, cases.operations(m, n, k), device)
    plain = makers[0][0].us
    for row, _ in makers:
        row.ratio = plain / row.us if plain and row.us else None
        row.verdict = tables.verdict(row, goals[row.scheme] if row.goal else None)
    shown(makers)


def norms(
    m: int, k: int, clock: Any, tops: Ceilings, device: torch.device, dtype: torch.dtype, rows: list[Row]
) -> None:
    """Adds the rows of one residual add, norm and quantize."""
    head = f"norm of {k}", m, "int8"
    makers = [
        (Row(*head, by, goal=goal), functools.partial(cases.norm, m, k, device, dtype, fused))
        for by, goal, fused in (("qpass", f"{cases.NORM_SHARE:.0%} of copy", True), ("torch, op by op", "", False))
    ]
    rows += [row for row, _ in makers]
    timed(makers, clock, tops, 0.0, device)
    for row, _ in makers:
        if row.goal and not row.verdict and row.share is not None:
            row.verdict = "met" if row.share >= cases.NORM_SHARE else "missed"
    shown(makers)


def codes(
    m: int, k: int, clock: Any, tops: Ceilings, device: torch.device, dtype: torch.dtype, rows: list[Row]
) -> None:
    """Adds the rows of quantizes by themselves and with an activation."""
    for kind in quantizes.QUANTIZES:
        makers = [
            (
                Row(f"rows of {k}", m, kind.name, by),
                functools.partial(quantizes.ready, kind, m, k, device, dtype, fused),
            )
            for by, fused in (("torch, op by op", False), ("qpass", True))
        ]
        rows += [row for row, _ in makers]
        timed(makers, clock, tops, 0.0, device)
        _compared(makers)


def convolution(
    layer: Layer, batch: int, clock: Any, tops: Ceilings, device: torch.device, dtype: torch.dtype, rows: list[Row]
) -> None:
    """Adds the rows of one convolution of so many images."""
    makers = [
        (Row(str(layer), batch, "bf16", "torch F.conv2d"), lambda: convolutions.plain(layer, batch, device, dtype)),
        (Row(str(layer), batch, "int8", "qpass"), lambda: convolutions.ours(layer, batch, device)),
    ]
    rows += [row for row, _ in makers]
    timed(makers, clock, tops, convolutions.operations(layer, batch), device)
    _compared(makers)


def pool(
    layer: Layer, batch: int, clock: Any, tops: Ceilings, device: torch.device, dtype: torch.dtype, rows: list[Row]
) -> None:
    """Adds the rows of one max pool of so many images."""
    case = convolutions.pool_name(layer)
    makers = [
        (Row(case, batch, scheme, by), functools.partial(convolutions.pool, layer, batch, device, taken))
        for scheme, by, taken in (("bf16", "torch F.max_pool2d", dtype), ("int8", "qpass", torch.int8))
    ]
    rows += [row for row, _ in makers]
    timed(makers, clock, tops, 0.0, device)
    _compared(makers)


def _compared(makers: Sequence[Maker]) -> None:
    """Ratios to the first, and a line for each."""
    plain = makers[0][0].us
    for row, _ in makers:
        row.ratio = plain / row.us if plain and row.us else None
    shown(makers)


def timed(makers: Sequence[Maker], clock: Any, tops: Ceilings, operations: float, device: torch.device) -> None:
    """Fills rows in: what fails says why, what is wrong is not timed, the rest is replayed in turn."""
    graphs, filled = [], []
    for row, make in makers:
        try:
            ready = make()
            row.note = ready.note
            row.error, row.allowed = ready.judge()
            if not row.error <= row.allowed:
                row.verdict = "wrong"
                continue
            graphs.append(clock.prepare(ready.calls))
            filled.append((row, ready))
        except timing.Lost:
            raise
        except Exception as error:
            row.verdict = f"failed: {timing.reason(error)}"
            _survived(row, device)
    for (row, ready), times in zip(filled, clock.measure(graphs), strict=True):
        row.us, row.low, row.high = times.median, times.low, times.high
        least, row.bound = tops.bound(ready.bytes, operations, ready.rate)
        row.share = least / times.median


def shown(makers: Sequence[Maker]) -> None:
    """Prints a line for each row."""
    for row, _ in makers:
        us = "" if row.us is None else f"{row.us:.2f} us"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        print(f"{row.case:>12} {row.m:>5} {row.scheme:6} {row.by:36} {us:>12} {ratio:>7}  {row.verdict}", flush=True)


def _survived(row: Row, device: torch.device) -> None:
    try:
        timing.alive(device)
    except timing.Lost as lost:
        raise timing.Lost(f"{row.case}, {row.m} rows, {row.scheme} by {row.by}: {row.verdict}; {lost}") from lost


def _tuned(
    args: argparse.Namespace, key: tuple[str, int, int, int], run: Callable[..., Any], device: torch.device
) -> None:
    """Tunes what is looked up by a key, unless it was; the row is measured with the rule's choice where that fails."""
    if known(*key, chip_of(device)) is not None:
        return
    try:
        run(device=device, seconds=args.tune, report=print)
    except timing.Lost:
        raise
    except Exception as error:
        kind, m, n, k = key
        print(f"{kind} {m} x {n} x {k}: not tuned: {timing.reason(error)}")
