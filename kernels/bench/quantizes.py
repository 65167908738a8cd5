"""Kernels that read rows and write 8-bit codes, beside the same in plain torch, op by op."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import Ready
from qpass_kernels import timing

ROWS = ((1, 4096), (16, 4096), (2048, 4096), (2048, 14336))
DRY_ROWS = ((5, 48),)
Q = torch.ops.qpass_kernels


@dataclass(frozen=True)
class Quantize:
    """Codes of rows. inputs: how many [M, K] it reads; value: their float value; run: our op -> (codes, scale, zero)."""

    name: str
    inputs: int
    dtype: torch.dtype
    value: Callable[..., Tensor]
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


E4M3 = torch.float8_e4m3fn
QUANTIZES = (
    Quantize("int8", 1, torch.int8, lambda x: x, lambda x: Q.quantize_rows(x, None, None, torch.int8, False)),
    Quantize("fp8", 1, E4M3, lambda x: x, lambda x: Q.quantize_rows(x, None, None, E4M3, True)),
    Quantize(
        "silu, mul, int8", 2, torch.int8, _silu_mul,
        lambda gate, up: Q.act_quantize(gate, up, "silu", None, None, None, 0, torch.int8, False),
    ),
)  # fmt: skip


def ready(kind: Quantize, rows: int, columns: int, device: torch.device, dtype: torch.dtype, fused: bool) -> Ready:
    """Our op, or plain torch. Error in steps of a code, from float64, of which rounding is half of one."""
    for module in ("quantize", "act_quantize"):
        importlib.import_module(f"qpass_kernels.{module}")
    moved = rows * columns * (kind.inputs * dtype.itemsize + 1)
    count = timing.copies_of(moved, device)
    held = [[torch.randn(rows, columns, device=device, dtype=dtype) for _ in range(kind.inputs)] for _ in range(count)]
    run = kind.run if fused else lambda *x: plain(kind.value(*x), kind.dtype)

    def judge() -> tuple[float, float]:
        codes, scale, zero = run(*held[0])
        true = kind.value(*(x.double() for x in held[0]))
        found = (codes.double() - zero.reshape(-1, 1)) * scale.reshape(-1, 1).double()
        step = scale.reshape(-1, 1).double()
        if kind.dtype == E4M3:  # its steps grow with the value
            step = torch.maximum(step * 2.0**-9, found.abs() / 8)
        return float(((found - true).abs() / step).max()), 0.85 if fused else 1.0

    return Ready([lambda x=x: run(*x) for x in held], moved, "", judge, "error in steps")


def plain(y: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """(codes, scale, zero) of the rows of y, as most write it."""
    y = y.float()
    if dtype == E4M3:
        scale = y.abs().amax(1, keepdim=True).clamp(min=1e-6) / 448
        return (y / scale).to(dtype), scale, torch.zeros_like(scale)
    low, high = y.amin(1, keepdim=True).clamp(max=0), y.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-6) / 255
    zero = (-128 - low / scale).round()
    return (y / scale + zero).round().clamp(-128, 127).to(dtype), scale, zero
