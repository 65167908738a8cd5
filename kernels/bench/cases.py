"""What is measured, and what is asked of it: goals as data, and our kernels as functions to time and to check."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.peers import Peer, Problem, plain
from qpass_kernels import samples, timing
from qpass_kernels.configs import Config, rule
from qpass_kernels.launch import chip_of
from qpass_kernels.matmul import KERNELS
from qpass_kernels.measured import known
from qpass_kernels.tuning import described

# (N, K, M) -> kind -> how many times as fast as bfloat16
GOALS = {
    (4096, 4096, 1): {"w8a8": 1.75, "w4a16": 2.5, "w4a8": 2.5},
    (14336, 4096, 1): {"w8a8": 1.9, "w4a16": 3.3, "w4a8": 3.5},
    (28672, 8192, 1): {"w8a8": 2.0, "w4a16": 3.5, "w4a8": 3.7},
    (14336, 4096, 16): {"w8a8": 1.85, "w4a16": 3.0, "w4a8": 3.3},
    (14336, 4096, 64): {"w8a8": 1.85, "w4a16": 2.2, "w4a8": 2.9},
    (14336, 4096, 2048): {"w8a8": 1.65, "fp8": 1.65, "w4a16": 0.90, "w4a8": 1.5},
    (14336, 4096, 8192): {"w8a8": 1.72, "fp8": 1.72, "w4a16": 0.97, "w4a8": 1.55},
}
NORMS = ((2048, 4096), (8192, 4096))  # rows x columns
NORM_SHARE = 0.80  # of the copy bandwidth
KINDS = ("w8a8", "fp8", "w8a16", "w4a16", "w4a8")
QUANTIZED = ("w8a8", "fp8", "w4a8")  # kinds whose goal includes the quantize of x
BYTES = {"w4a16": 0.5 + 3 / 128, "w4a8": 0.5 + 2 / 128}  # of a weight with its scales; 1 for the others
RATES = {"w8a8": "int8", "w4a8": "int8", "fp8": "fp8"}
CHECKED = 64  # rows compared with float64
HALF = 0.55  # steps that a code may be off: rounding, and float32 before it
WORSE = 2.0  # so many times the error of the plain path is right


@dataclass(frozen=True, eq=False)
class Ready:
    """Calls to time, one for each copy of the weights; what they move and compute; (error, largest allowed error)."""

    calls: list[Callable[[], Any]]
    bytes: float
    rate: str
    judge: Callable[[], tuple[float, float]]
    note: str = ""


def problem(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random x and w of a layer's size."""
    return Problem(
        torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype) / k**0.5
    )


def operations(m: int, n: int, k: int) -> float:
    """Of a product."""
    return 2.0 * m * n * k


def ours(kind: str, quantize: bool, given: Problem) -> Ready:
    """Our kernel of a kind on random weights of its own; quantize: with that of x in front."""
    m, n, k = given.size
    device, dtype = given.x.device, given.x.dtype
    sample = samples.make(kind, m, n, k, device, dtype)
    config = known(kind, m, n, k, chip_of(device)) or rule(kind, m, n, k, chip_of(device))
    copies = sample.copies(timing.copies_of(int(n * k * BYTES.get(kind, 1)), device))
    run = (lambda s: samples.run(_quantized(s, given.x), config)) if quantize else (lambda s: samples.run(s, config))
    moved = n * k * BYTES.get(kind, 1) + m * n * dtype.itemsize
    moved += m * k * (dtype.itemsize if quantize or kind in ("w8a16", "w4a16") else 1)
    return Ready(
        [lambda s=s: run(s) for s in copies],
        moved,
        RATES.get(kind, "bf16"),
        lambda: judged(_quantized(sample, given.x) if quantize else sample, config),
        described(config),
    )


def _quantized(sample: samples.Sample, x: Tensor) -> samples.Sample:
    importlib.import_module("qpass_kernels.quantize")
    whole = sample.kind != "fp8"
    dtype = torch.int8 if whole else torch.float8_e4m3fn
    codes, scale, zero = KERNELS["quantize_rows"](x, None, None, dtype, not whole)
    after = replace(sample.epilogue, row_scale=scale, row_zero=zero if whole else None)
    return replace(sample, x=codes, epilogue=after)


def judged(sample: samples.Sample, config: Config | None) -> tuple[float, float]:
    """(mean square error of some rows against float64, what is allowed); the largest error counts too, scaled to it."""
    y = samples.run(sample, config)
    rows = samples.some_rows(y.shape[0], CHECKED, y.device)
    true, simple = samples.exact(sample, rows)
    largest, mean = samples.errors(y[rows], true)
    largest_allowed, mean_allowed = samples.errors(simple, true)
    return max(mean, largest * mean_allowed / max(largest_allowed, 1e-30)), WORSE * mean_allowed


def theirs(peer: Peer, given: Problem) -> Ready:
    """A peer's kernel on the weights of the problem."""
    m, n, k = given.size
    held, call = peer.build(given)
    call(held)
    count = timing.copies_of(int(n * k * peer.bytes), given.x.device)
    copies = [held, *(_copied(held) for _ in range(count - 1))]
    moved = n * k * peer.bytes + (m * n + m * k) * given.x.dtype.itemsize

    def judge() -> tuple[float, float]:
        rows = samples.some_rows(m, CHECKED, given.x.device)
        return samples.errors(call(held)[rows], given.x[rows].double() @ given.w.double().t())[1], peer.loose

    return Ready([lambda h=h: call(h) for h in copies], moved, RATES.get(peer.scheme, "bf16"), judge)


def baseline(given: Problem) -> Ready:
    """The plain path."""
    return theirs(Peer("torch F.linear", "bf16", given.x.dtype.itemsize, plain, 0.02), given)


def _copied(held: Any) -> Any:
    return tuple(part.clone() for part in held) if isinstance(held, tuple) else copy.deepcopy(held)


def steps_off(found: Tensor, true: Tensor, step: Tensor, dtype: torch.dtype, roundings: int) -> tuple[float, float]:
    """(largest error in steps of a code, what is allowed), without what rounding to dtype so many times may add."""
    slack = roundings * torch.finfo(dtype).eps / 2 * true.abs()
    return float((((found - true).abs() - slack) / step).max()), HALF


def norm(rows: int, columns: int, device: torch.device, dtype: torch.dtype, fused: bool) -> Ready:
    """Residual add, RMSNorm and int8 codes with a scale a row: our op, or the same in plain torch.

    Moved: x and the residual in, the sum and the codes out.
    """
    size = rows * columns
    weight = torch.rand(columns, device=device, dtype=dtype) + 0.5
    count = timing.copies_of(size * (3 * dtype.itemsize + 1), device)
    pairs = [tuple(torch.randn(rows, columns, device=device, dtype=dtype) for _ in range(2)) for _ in range(count)]
    if fused:
        importlib.import_module("qpass_kernels.norm_quantize")
    run = _fused_norm if fused else _plain_norm

    def judge() -> tuple[float, float]:
        codes, scale, zero = run(*pairs[0], weight)
        value = sum(part.float() for part in pairs[0]).to(dtype).double()
        true = value * torch.rsqrt(value.square().mean(1, keepdim=True) + 1e-6) * weight.double()
        step = scale.reshape(-1, 1).double()
        return steps_off((codes.double() - zero.reshape(-1, 1)) * step, true, step, dtype, 1 if fused else 3)

    calls = [lambda p=p: run(*p, weight) for p in pairs]
    return Ready(calls, size * (3 * dtype.itemsize + 1), "", judge, "error in steps")


def _fused_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return KERNELS["norm_quantize"](
        x, residual, weight, None, 1e-6, True, None, None, None, 0, torch.int8, False, False
    )[2:]


def _plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    y = functional.rms_norm(total, weight.shape, weight, 1e-6).float()
    low, high = y.amin(1, keepdim=True).clamp(max=0), y.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-6) / 255
    zero = (-128 - low / scale).round()
    return (y / scale + zero).round().clamp(-128, 127).to(torch.int8), scale, zero
