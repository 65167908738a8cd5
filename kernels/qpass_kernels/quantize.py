"""Floats to 8-bit codes, one scale a row found at run time, or one scale given: y = x * mul + add, columns first.

    int8            lo = min(row, 0), hi = max(row, 0); scale = hi / 255 - lo / 255
                    zero = clamp(round(-lo / scale), 0, 255) - 128; codes = clamp(round(y / scale) + zero, -128, 127)
    symmetric int8  scale = max(-lo, hi) / 127; codes = clamp(round(y / scale), -127, 127)
    float8_e4m3fn   scale = max(-lo, hi) / 448; codes = clamp(y / scale, -448, 448)

A row of 0 has scale 1, others at least 2^-126. A NaN or infinity leaves a scale that is not finite. Rounding is half to even.
A kernel keeps up to LIMIT (rows.py) columns of a row in registers and reads those beyond once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels.blocks import e4m3, round_even
from qpass_kernels.launch import OPTIONS, cdiv, check_device
from qpass_kernels.matmul import define
from qpass_kernels.rows import TILE, Rows, flat, options, shapes

MIN_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def by_column(y, mul, add, column, K):
    """Y * mul + add of columns [1, B]; 0 beyond K stays 0."""
    if mul is not None:
        y = y * tl.load(mul + column, mask=column < K, other=0.0)
    if add is not None:
        y = y + tl.load(add + column, mask=column < K, other=0.0)
    return y


@triton.jit
def widened(lo, hi, y, SYMMETRIC: tl.constexpr):
    """Limits [R, 1] widened to y [R, B]: bits of a float32, hi as int32 of the largest, lo as uint32 of the least value.

    Positive floats are ordered like their bits, NaN above infinity; so are negative ones without their sign. Bits of a
    negative number are below 0 as int32, and those of a positive one below 2^31 as uint32. SYMMETRIC: hi of |y|.
    """
    bits = (tl.abs(y) if SYMMETRIC else y).to(tl.int32, bitcast=True)
    hi = tl.maximum(hi, tl.max(bits, 1, keep_dims=True))
    if not SYMMETRIC:
        lo = tl.maximum(lo, tl.max(bits.to(tl.uint32, bitcast=True), 1, keep_dims=True))
    return lo, hi


@triton.jit
def row_scale(scale_ptr, zero_ptr, lo, hi, row, M, SYMMETRIC: tl.constexpr, TOP: tl.constexpr):
    """(scale, zero) [R, 1], float32, of the limits of `widened`; written as scale and zero."""
    hi = hi.to(tl.float32, bitcast=True)
    if SYMMETRIC:
        scale = tl.div_rn(hi, tl.full(hi.shape, TOP, tl.float32))
        nothing = hi == 0.0
    else:
        lo = tl.where((lo >> 31) != 0, lo.to(tl.float32, bitcast=True), 0.0)
        steps = tl.full(hi.shape, 255.0, tl.float32)
        scale = tl.div_rn(hi, steps) - tl.div_rn(lo, steps)
        nothing = hi == lo
    scale = tl.where(nothing, 1.0, tl.maximum(scale, MIN_SCALE, propagate_nan=tl.PropagateNan.ALL))
    zero = tl.zeros_like(scale) if SYMMETRIC else round_even(tl.clamp(tl.div_rn(0.0 - lo, scale), 0.0, 255.0)) - 128.0
    tl.store(scale_ptr + row, scale, mask=row < M)
    tl.store(zero_ptr + row, zero.to(tl.int32), mask=row < M)
    return scale, zero


@triton.jit
def static_scale(scale, zero, ROWS: tl.constexpr):
    """One scale and zero as `row_scale` returns those of ROWS rows."""
    return tl.full((ROWS, 1), scale, tl.float32), tl.full((ROWS, 1), zero, tl.float32)


@triton.jit
def quotient(y, scale):
    """Y / scale, correctly rounded between 2^-20 and 1024; NaN where scale is not finite (Markstein 1990).

    One division a row, then a residual. Powers of two keep the residual of small and large scales a normal number.
    """
    shift = tl.where(scale < 2.0**-60, 2.0**64, tl.where(scale > 2.0**60, 2.0**-64, 1.0))
    y = y * shift
    scale = scale * shift
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    q = tl.clamp(y * inverse, -1024.0, 1024.0)
    return tl.fma(tl.fma(0.0 - q, scale, y), inverse, q)


@triton.jit
def write_codes(codes, y, scale, zero, row, column, M, K, LEAST: tl.constexpr, E4M3: tl.constexpr):
    """Codes [M, K], as bytes, of y [R, B]; scale and zero are [R, 1]. A NaN is NaN in e4m3, LEAST in int8."""
    q = quotient(y, scale)
    if E4M3:
        code = e4m3(q).to(tl.int8, bitcast=True)
    else:
        code = tl.clamp(round_even(tl.clamp(q, -1024.0, 1024.0)) + zero, LEAST, 127.0).to(tl.int8)
    tl.store(codes + row.to(tl.int64) * K + column, code, mask=(row < M) & (column < K))


@triton.jit
def value_of(x, mul, add, row, column, M, K, stride):
    """X * mul + add, float32 [R, B]; 0 outside."""
    y = tl.load(x + row.to(tl.int64) * stride + column, mask=(row < M) & (column < K), other=0.0).to(tl.float32)
    return by_column(y, mul, add, column, K)


@triton.jit(do_not_specialize=["M"])
def own_scales(
    x, mul, add, codes, scale, zero, M, K, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, SYMMETRIC: tl.constexpr, TOP: tl.constexpr,
    LEAST: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """ROWS rows of K columns, each with its own scale. ONE: K is at most BLOCK."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    lo, hi = tl.zeros((ROWS, 1), tl.uint32), tl.zeros((ROWS, 1), tl.int32)
    y = value_of(x, mul, add, row, column, M, K, stride)
    lo, hi = widened(lo, hi, y, SYMMETRIC)
    if not ONE:
        for start in range(BLOCK, K, BLOCK):
            lo, hi = widened(lo, hi, value_of(x, mul, add, row, start + column, M, K, stride), SYMMETRIC)
    step, at = row_scale(scale, zero, lo, hi, row, M, SYMMETRIC, TOP)
    write_codes(codes, y, step, at, row, column, M, K, LEAST, E4M3)
    if not ONE:
        for start in range(BLOCK, K, BLOCK):
            y = value_of(x, mul, add, row, start + column, M, K, stride)
            write_codes(codes, y, step, at, row, start + column, M, K, LEAST, E4M3)


@triton.jit(do_not_specialize=["M"])
def one_scale(
    x, mul, add, codes, scale, zero, M, K, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, E4M3: tl.constexpr
):
    """[ROWS, BLOCK] under one scale."""
    across = tl.cdiv(K, BLOCK)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = value_of(x, mul, add, row, column, M, K, stride)
    step, at = static_scale(scale, zero, ROWS)
    write_codes(codes, y, step, at, row, column, M, K, -128.0, E4M3)


def by_row(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher of `quantize_rows`: codes [..., K], scale and zero [..., 1]."""
    rows.check("quantize_rows", x)
    check_device("quantize_rows", x)
    m, k = x.shape[:-1].numel(), x.shape[-1]
    if m == 0 or k == 0:
        return rows.reference(x)
    codes, scale, zero = rows.empty(x)
    x, sizes = flat(x), shapes(m, k)
    own_scales[cdiv(m, sizes["ROWS"]),](
        x, rows.mul, rows.add, codes.view(torch.int8), scale, zero, m, k, x.stride(0), **sizes, **options(rows), **OPTIONS
    )  # fmt: skip
    return codes, scale, zero


def by_tensor(x: Tensor, rows: Rows) -> Tensor:
    """The launcher of `quantize_tensor`: codes [..., K]."""
    rows.check("quantize_tensor", x)
    check_device("quantize_tensor", x)
    codes = rows.empty(x)[0]
    if x.numel() == 0:
        return codes
    if rows.mul is None and rows.add is None and x.is_contiguous() and x.numel() < 2**31:
        x = x.reshape(1, -1)
    x = flat(x)
    m, k = x.shape
    sizes = shapes(m, min(k, TILE))
    programs = cdiv(m, sizes["ROWS"]) * cdiv(k, sizes["BLOCK"])
    one_scale[programs,](
        x, rows.mul, rows.add, codes.view(torch.int8), rows.out_scale, float(rows.out_zero), m, k, x.stride(0),
        ROWS=sizes["ROWS"], BLOCK=sizes["BLOCK"], E4M3=codes.dtype != torch.int8, num_warps=sizes["num_warps"], **OPTIONS,
    )  # fmt: skip
    return codes


def _row_arguments(mul: Tensor | None, add: Tensor | None, dtype: torch.dtype, symmetric: bool) -> Rows:
    return Rows(mul, add, None, 0, dtype, symmetric)


def _reference(op: str, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    rows.check(op, x)
    return rows.reference(x)


define(
    "quantize_rows(Tensor x, Tensor? mul, Tensor? add, ScalarType dtype, bool symmetric) -> (Tensor, Tensor, Tensor)",
    lambda x, *args: by_row(x, _row_arguments(*args)),
    lambda x, *args: _reference("quantize_rows", x, _row_arguments(*args)),
    lambda x, *args: _row_arguments(*args).empty(x),
)
define(
    "quantize_tensor(Tensor x, Tensor? mul, Tensor? add, float scale, int zero, ScalarType dtype) -> Tensor",
    lambda x, *args: by_tensor(x, Rows(*args)),
    lambda x, *args: _reference("quantize_tensor", x, Rows(*args))[0],
    lambda x, *args: Rows(*args).empty(x)[0],
)
