"""An activation, gated or not, and the quantization of its rows, in one pass: y = (act(x) * gate) * mul + add.

act(x) and its product with gate are rounded to the dtype of x, as torch does op by op; then quantize.py. x and gate may be
halves of one wider tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels.activations import NAMES, activate
from qpass_kernels.blocks import rounded
from qpass_kernels.epilogue import ACTIVATIONS
from qpass_kernels.launch import OPTIONS, cdiv, check_device
from qpass_kernels.matmul import define
from qpass_kernels.quantize import by_column, row_scale, static_scale, widened, write_codes
from qpass_kernels.rows import Rows, check_like, flat, options, shapes

OP = "act_quantize"


@triton.jit
def activated(x, gate, mul, add, row, column, M, K, stride, gate_stride, ACT: tl.constexpr):
    """The values that are quantized, float32 [R, B]; 0 outside."""
    inside = (row < M) & (column < K)
    y = tl.load(x + row.to(tl.int64) * stride + column, mask=inside, other=0.0).to(tl.float32)
    if ACT != "":
        y = rounded(activate(y, ACT), x.dtype.element_ty)
    if gate is not None:
        other = tl.load(gate + row.to(tl.int64) * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        y = rounded(y * other, x.dtype.element_ty)
    return tl.where(inside, by_column(y, mul, add, column, K), 0.0)


@triton.jit(do_not_specialize=["M"])
def activated_codes(
    x, gate, mul, add, codes, scale, zero, out_scale, out_zero, M, K, stride, gate_stride, ACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, SYMMETRIC: tl.constexpr, TOP: tl.constexpr,
    LEAST: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """ROWS rows of K columns. scale and zero: None where out_scale and out_zero hold for all. ONE: K is at most BLOCK."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    y = activated(x, gate, mul, add, row, column, M, K, stride, gate_stride, ACT)
    if scale is None:
        step, at = static_scale(out_scale, out_zero, ROWS)
    else:
        lo, hi = widened(tl.zeros((ROWS, 1), tl.uint32), tl.zeros((ROWS, 1), tl.int32), y, SYMMETRIC)
        if not ONE:
            for start in range(BLOCK, K, BLOCK):
                more = activated(x, gate, mul, add, row, start + column, M, K, stride, gate_stride, ACT)
                lo, hi = widened(lo, hi, more, SYMMETRIC)
        step, at = row_scale(scale, zero, lo, hi, row, M, SYMMETRIC, TOP)
    write_codes(codes, y, step, at, row, column, M, K, LEAST, E4M3)
    if not ONE:
        for start in range(BLOCK, K, BLOCK):
            y = activated(x, gate, mul, add, row, start + column, M, K, stride, gate_stride, ACT)
            write_codes(codes, y, step, at, row, start + column, M, K, LEAST, E4M3)


def check(x: Tensor, gate: Tensor | None, act: str, rows: Rows) -> None:
    """Raises ValueError where the arguments of `act_quantize` do not fit together."""
    rows.check(OP, x)
    if act not in NAMES:
        raise ValueError(f"{OP}: activation {act!r} is not one of {', '.join(filter(None, NAMES))}")
    check_like(OP, "gate", gate, x)


def by_act(x: Tensor, gate: Tensor | None, act: str, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher of `act_quantize`: codes [..., K], scale and zero [..., 1], or [0] under an out_scale."""
    check(x, gate, act, rows)
    check_device(OP, x)
    m, k = x.shape[:-1].numel(), x.shape[-1]
    if m == 0 or k == 0:
        return rows.reference(x)
    codes, scale, zero = rows.empty(x)
    x, gate, sizes = flat(x), None if gate is None else flat(gate), shapes(m, k)
    activated_codes[cdiv(m, sizes["ROWS"]),](
        x, gate, rows.mul, rows.add, codes.view(torch.int8), *rows.written(scale, zero), m, k, x.stride(0),
        0 if gate is None else gate.stride(0), ACT=act, **sizes, **options(rows), **OPTIONS,
    )  # fmt: skip
    return codes, scale, zero


def reference(x: Tensor, gate: Tensor | None, act: str, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """`act_quantize` in plain torch."""
    check(x, gate, act, rows)
    y = ACTIVATIONS[act](x.float()).to(x.dtype)
    return rows.reference(y if gate is None else y * gate)


define(
    f"{OP}(Tensor x, Tensor? gate, str act, Tensor? mul, Tensor? add, float? out_scale, int out_zero, ScalarType dtype, "
    "bool symmetric) -> (Tensor, Tensor, Tensor)",
    lambda x, gate, act, *args: by_act(x, gate, act, Rows(*args)),
    lambda x, gate, act, *args: reference(x, gate, act, Rows(*args)),
    lambda x, gate, act, *args: Rows(*args).empty(x),
)
