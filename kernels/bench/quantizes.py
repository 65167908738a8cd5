"""Kernels that read rows and write 8-bit codes, beside the same in plain torch, op by op."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import Ready, steps_off
from qpass_kernels import timing
from qpass_kernels.matmul import KERNELS

ROWS = ((1, 4096), (16, 4096), (2048, 4096), (2048, 14336))
DRY_ROWS = ((5, 48),)
SCALE = 0.05  # of codes with one scale for all


@dataclass(frozen=True)
class Quantize:
    """Codes of rows. inputs: how many [M, K] it reads; value: their float value; run: our kernel -> (codes, scale, zero);
    one: whether all rows have SCALE, and 0 is code 0.
    """

    name: str
    inputs: int
    dtype: torch.dtype
    value: Callable[..., Tensor]
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    one: bool = False


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _one_scale(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = KERNELS["quantize_tensor"](x, None, None, SCALE, 0, torch.int8)
    return codes, torch.full((), SCALE, device=x.device), torch.zeros((), device=x.device)


E4M3 = torch.float8_e4m3fn
QUANTIZES = (
    Quantize("int8", 1, torch.int8, lambda x: x, lambda x: KERNELS["quantize_rows"](x, None, None, torch.int8, False)),
    Quantize("fp8", 1, E4M3, lambda x: x, lambda x: KERNELS["quantize_rows"](x, None, None, E4M3, True)),
    Quantize("int8, one scale", 1, torch.int8, lambda x: x, _one_scale, True),
    Quantize(
        "silu, mul, int8", 2, torch.int8, _silu_mul,
        lambda gate, up: KERNELS["act_quantize"](gate, up, "silu", None, None, None, 0, torch.int8, False),
    ),
)  # fmt: skip


def ready(kind: Quantize, rows: int, columns: int, device: torch.device, dtype: torch.dtype, fused: bool) -> Ready:
    """Our op, or plain torch. Error in steps of a code, from float64, of which rounding is half of one."""
    for module in ("quantize", "act_quantize"):
        importlib.import_module(f"qpass_kernels.{module}")
    moved = rows * columns * (kind.inputs * dtype.itemsize + 1)
    count = timing.copies_of(moved, device)
    held = [[torch.randn(rows, columns, device=device, dtype=dtype) for _ in range(kind.inputs)] for _ in range(count)]
    run = kind.run if fused else lambda *x: plain(kind.value(*x), kind.dtype, kind.one)

    def judge() -> tuple[float, float]:
        codes, scale, zero = run(*held[0])
        true = kind.value(*(x.double() for x in held[0]))
        step = scale.reshape(-1, 1).double()
        found = (codes.double() - zero.reshape(-1, 1)) * step
        if kind.dtype == E4M3:  # its steps grow with the value
            step = torch.maximum(step * 2.0**-9, found.abs() / 8)
        return steps_off(found, true, step, dtype, 2 * (kind.inputs - 1))  # silu is rounded, and the product

    return Ready([lambda x=x: run(*x) for x in held], moved, "", judge, "error in steps")


def plain(y: Tensor, dtype: torch.dtype, one: bool = False) -> tuple[Any, ...]:
    """(codes, scale, zero) of the rows of y, as most write it; one: with SCALE for all."""
    y = y.float()
    if one:
        scale = torch.full((), SCALE, device=y.device)
        return (y / SCALE).round().clamp(-128, 127).to(dtype), scale, torch.zeros_like(scale)
    if dtype == E4M3:
        scale = y.abs().amax(1, keepdim=True).clamp(min=1e-6) / 448
        return (y / scale).to(dtype), scale, torch.zeros_like(scale)
    low, high = y.amin(1, keepdim=True).clamp(max=0), y.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-6) / 255
    zero = (-128 - low / scale).round()
    return (y / scale + zero).round().clamp(-128, 127).to(dtype), scale, zero
