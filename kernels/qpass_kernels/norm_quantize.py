"""A residual sum, its RMS or layer norm, and the quantization of the normed rows, in one pass.

    h = x + residual                                            rounded to the dtype of x
    rms    n = h * rsqrt(mean(h^2) + eps) * weight + bias        rounded to the dtype of x
    layer  n = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias
    y = n * mul + add, quantized as in quantize.py

The variance is the mean of squares around the mean, blocks of long rows put together as in Chan et al. 1979.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from qpass_kernels.blocks import rounded
from qpass_kernels.epilogue import check_vector
from qpass_kernels.launch import OPTIONS, cdiv, check_device
from qpass_kernels.matmul import define
from qpass_kernels.quantize import by_column, row_scale, static_scale, widened, write_codes
from qpass_kernels.rows import FLOATS, Rows, check_like, flat, options, shapes

OP = "norm_quantize"


@triton.jit
def hidden(x, residual, total, row, column, M, K, stride, residual_stride):
    """X + residual, float32 [R, B] of values of x's dtype; 0 outside. Written to total [M, K], unless that is None."""
    inside = (row < M) & (column < K)
    h = tl.load(x + row.to(tl.int64) * stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + row.to(tl.int64) * residual_stride + column
        h = rounded(h + tl.load(at, mask=inside, other=0.0).to(tl.float32), x.dtype.element_ty)
    if total is not None:
        tl.store(total + row.to(tl.int64) * K + column, h.to(x.dtype.element_ty), mask=inside)
    return h


@triton.jit
def spread(h, column, K, count, RMS: tl.constexpr):
    """(mean, sum of squares around it) [R, 1] of the `count` columns inside K of h [R, B]; the mean is 0 where RMS."""
    if RMS:
        mean = tl.zeros((h.shape[0], 1), tl.float32)
    else:
        mean = tl.sum(h, 1, keep_dims=True) / count
        h = tl.where(column < K, h - mean, 0.0)
    return mean, tl.sum(h * h, 1, keep_dims=True)


@triton.jit
def normed(h, mean, rate, weight, bias, mul, add, kept, row, column, M, K, DTYPE: tl.constexpr):
    """The values that are quantized, float32 [R, B], 0 outside, of h; the norm is written to kept [M, K], unless None."""
    inside = (row < M) & (column < K)
    n = (h - mean) * rate
    if weight is not None:
        n = n * tl.load(weight + column, mask=column < K, other=0.0).to(tl.float32)
    if bias is not None:
        n = n + tl.load(bias + column, mask=column < K, other=0.0).to(tl.float32)
    n = rounded(n, DTYPE)
    if kept is not None:
        tl.store(kept + row.to(tl.int64) * K + column, n.to(DTYPE), mask=inside)
    return tl.where(inside, by_column(n, mul, add, column, K), 0.0)


@triton.jit(do_not_specialize=["M"])
def normed_codes(
    x, residual, weight, bias, mul, add, total, kept, codes, scale, zero, out_scale, out_zero, eps, M, K, stride,
    residual_stride, RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
    SYMMETRIC: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """ROWS rows of K columns. scale and zero: None where out_scale and out_zero hold for all. ONE: K is at most BLOCK."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    h = hidden(x, residual, total, row, column, M, K, stride, residual_stride)
    count = tl.zeros((1, 1), tl.float32) + tl.minimum(K, BLOCK)
    mean, squares = spread(h, column, K, count, RMS)
    if not ONE:
        for start in range(BLOCK, K, BLOCK):
            more = hidden(x, residual, total, row, start + column, M, K, stride, residual_stride)
            n = tl.minimum(K - start, BLOCK)
            other, around = spread(more, start + column, K, n, RMS)
            apart = other - mean
            squares += around + apart * apart * (count * n / (count + n))
            mean += apart * (n / (count + n))
            count += n
    rate = tl.rsqrt(squares / count + eps)
    y = normed(h, mean, rate, weight, bias, mul, add, kept, row, column, M, K, DTYPE)
    if scale is None:
        step, at = static_scale(out_scale, out_zero, ROWS)
    else:
        lo, hi = widened(tl.zeros((ROWS, 1), tl.uint32), tl.zeros((ROWS, 1), tl.int32), y, SYMMETRIC)
        if not ONE:
            for start in range(BLOCK, K, BLOCK):
                h = hidden(x, residual, None, row, start + column, M, K, stride, residual_stride)
                more = normed(h, mean, rate, weight, bias, mul, add, None, row, start + column, M, K, DTYPE)
                lo, hi = widened(lo, hi, more, SYMMETRIC)
        step, at = row_scale(scale, zero, lo, hi, row, M, SYMMETRIC, TOP)
    write_codes(codes, y, step, at, row, column, M, K, LEAST, E4M3)
    if not ONE:
        for start in range(BLOCK, K, BLOCK):
            h = hidden(x, residual, None, row, start + column, M, K, stride, residual_stride)
            y = normed(h, mean, rate, weight, bias, mul, add, kept, row, start + column, M, K, DTYPE)
            write_codes(codes, y, step, at, row, start + column, M, K, LEAST, E4M3)


def check(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rows: Rows
) -> None:
    """Raises ValueError where the arguments of `norm_quantize` do not fit together."""
    rows.check(OP, x)
    check_like(OP, "residual", residual, x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_vector(OP, name, value, x.shape[-1], FLOATS, x.device)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{OP}: eps must be finite and not negative, not {eps}")


def outputs(x: Tensor, residual: Tensor | None, keep: bool, rows: Rows) -> tuple[Tensor, ...]:
    """(sum, normed, codes, scale, zero) of `norm_quantize`, not filled; what is not asked for is [0]."""
    total = x.new_empty((0,) if residual is None else x.shape)
    return total, x.new_empty(x.shape if keep else (0,)), *rows.empty(x)


def by_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, keep: bool,
    rows: Rows,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The launcher of `norm_quantize`: (sum, normed, codes, scale, zero)."""
    check(x, residual, weight, bias, eps, rows)
    check_device(OP, x)
    m, k = x.shape[:-1].numel(), x.shape[-1]
    total, kept, codes, scale, zero = outputs(x, residual, keep, rows)
    if m == 0 or k == 0:
        return total, kept, *rows.reference(x)
    x, residual, sizes = flat(x), None if residual is None else flat(residual), shapes(m, k)
    normed_codes[cdiv(m, sizes["ROWS"]),](
        x, residual, weight, bias, rows.mul, rows.add, None if residual is None else total, kept if keep else None,
        codes.view(torch.int8), *rows.written(scale, zero), eps, m, k, x.stride(0),
        0 if residual is None else residual.stride(0), RMS=rms, **sizes, **options(rows), **OPTIONS,
    )  # fmt: skip
    return total, kept, codes, scale, zero


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, keep: bool,
    rows: Rows,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`norm_quantize` in plain torch."""
    check(x, residual, weight, bias, eps, rows)
    h = x if residual is None else x + residual
    weight, bias = (None if v is None else v.float() for v in (weight, bias))
    if rms:
        n = functional.rms_norm(h.float(), h.shape[-1:], weight, eps)
        n = n if bias is None else n + bias
    else:
        n = functional.layer_norm(h.float(), h.shape[-1:], weight, bias, eps)
    n = n.to(x.dtype)
    total, kept = outputs(x, residual, keep, rows)[:2]
    return total if residual is None else h, n if keep else kept, *rows.reference(n)


def _arguments(*args: Any) -> tuple[Any, ...]:
    return *args[:5], args[-1], Rows(*args[5:-1])


define(
    f"{OP}(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, Tensor? mul, Tensor? add, "
    "float? out_scale, int out_zero, ScalarType dtype, bool symmetric, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *args: by_norm(x, *_arguments(*args)),
    lambda x, *args: reference(x, *_arguments(*args)),
    lambda x, *args: outputs(x, args[0], args[-1], _arguments(*args)[-1]),
)
