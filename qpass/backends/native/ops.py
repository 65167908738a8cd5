"""The ops that the native kernels run: schema, shape rule and reference, as in qpass/ops.py.

A lowered graph holds them by these names; their references run it where the kernels are not there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qpass import affine
from qpass.ops import activation, define
from qpass.qtype import QType

PER_ROW = QType.parse("u8/token")


def unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """int8 [N, K] from the kernels' layout [ceil(N / 64), ceil(K / 4), 64, 4]."""
    panels, groups = packed.shape[:2]
    return packed.permute(0, 2, 1, 3).reshape(panels * 64, groups * 4)[:n, :k]


def packed_linear(
    x: Tensor,
    packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    offset: Tensor,
    row_scale: Tensor | None,
    row_zero: Tensor | None,
    other: Tensor | None,
    n: int,
    act: str,
    out_scale: float,
    out_zero: int,
    dtype: torch.dtype,
) -> Tensor:
    """Y = act((x @ w.T - row_zero * offset) * alpha * row_scale + beta + other), [..., N].

    x: u8 [..., K]. packed: w int8 [N, K] as `unpack` reads it. alpha, beta: float32 [N]. offset: int32 [N], the column
    sums of w; times the input's zero point where there are no row scales. row_scale float32, row_zero int32: [..., 1].
    other: [..., N]. dtype: float32, bfloat16, or uint8 for codes of out_scale and out_zero.
    """
    weight = unpack(packed, n, x.shape[-1])
    total = functional.linear(x.to(torch.float64), weight.to(torch.float64))
    total = total - (offset if row_zero is None else row_zero.to(torch.float64) * offset)
    y = total.float() * alpha if row_scale is None else total.float() * alpha * row_scale
    y = y + beta
    y = activation(act)(y if other is None else y + other.float())
    if dtype is torch.uint8:
        return ((y / out_scale).round() + out_zero).clamp(0, 255).to(torch.uint8)
    return y.to(dtype)


def _packed_linear_fake(x, packed, alpha, beta, offset, row_scale, row_zero, other, n, act, out_scale, out_zero, dtype):
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    other: Tensor | None,
    n: int,
    act: str,
    dtype: torch.dtype,
) -> Tensor:
    """Y = act((x @ w.T) * alpha + beta + other), [..., N] in `dtype`, computed in float32.

    x: float [..., K]. packed: w as int8 [ceil(N / 64), K, 64]. alpha, beta: float32 [N]. other: [..., N].
    """
    weight = packed.transpose(1, 2).reshape(-1, packed.shape[1])[:n]
    y = functional.linear(x.float(), weight.float()) * alpha + beta
    return activation(act)(y if other is None else y + other.float()).to(dtype)


def _weight_only_linear_fake(x, packed, alpha, beta, other, n, act, dtype):
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    mul: Tensor | None,
    add: Tensor | None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, [batch, heads, queries, width], laid out as [batch, queries, heads, width].

    q, k, v: bfloat16 [batch, heads, length, width]; k and v may have fewer heads. mask: bool (True is seen) or float. With
    mul and add, float32 [heads * width]: codes clamp(round(y * mul + add), 0, 255), uint8.
    """
    grouped = k.shape[1] != q.shape[1]
    y = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    y = y.transpose(1, 2).contiguous()
    if mul is not None and add is not None:
        codes = (y.flatten(-2).float() * mul + add).round().clamp(0, 255)
        y = codes.to(torch.uint8).view(y.shape)
    return y.transpose(1, 2)


def _attention_fake(q, k, v, mask, causal, scale, mul, add):
    shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    return q.new_empty(shape, dtype=torch.uint8 if mul is not None else q.dtype).transpose(1, 2)


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    mul: Tensor,
    add: Tensor,
    dynamic: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, codes, row scale, row zero) of a norm over the last axis of x, float32 [..., K], and what quantizes it.

    codes: u8 [..., K], clamp(round(y * mul + add)); where dynamic, of y * mul + add by the scale and zero point of its row.
    What is not asked for (y without keep, row scales without dynamic) is empty.
    """
    width = (x.shape[-1],)
    y = functional.rms_norm(x, width, weight, eps) if rms else functional.layer_norm(x, width, weight, bias, eps)
    if rms and bias is not None:
        y = y + bias
    z, kept, nothing = y * mul + add, y if keep else x.new_empty(0), x.new_empty(0)
    if not dynamic:
        return kept, z.round().clamp(0, 255).to(torch.uint8), nothing, nothing.to(torch.int32)
    scale, zero = affine.choose_dynamic(z, PER_ROW)
    return kept, affine.quantize(z, scale, zero, PER_ROW), scale, zero


def _norm_quantize_fake(x, weight, bias, eps, rms, mul, add, dynamic, keep):
    rows = (*x.shape[:-1], 1) if dynamic else (0,)
    new = [x.new_empty(x.shape if keep else (0,)), x.new_empty(x.shape, dtype=torch.uint8)]
    return (*new, x.new_empty(rows), x.new_empty(rows, dtype=torch.int32))


OPS = (
    (
        "packed_linear(Tensor x, Tensor packed, Tensor alpha, Tensor beta, Tensor offset, Tensor? row_scale, "
        "Tensor? row_zero, Tensor? other, int n, str act, float out_scale, int out_zero, ScalarType dtype) -> Tensor",
        packed_linear,
        _packed_linear_fake,
    ),
    (
        "weight_only_linear(Tensor x, Tensor packed, Tensor alpha, Tensor beta, Tensor? other, int n, str act, "
        "ScalarType dtype) -> Tensor",
        weight_only_linear,
        _weight_only_linear_fake,
    ),
    (
        "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, Tensor? mul, Tensor? add) "
        "-> Tensor",
        attention,
        _attention_fake,
    ),
    (
        "norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, Tensor mul, Tensor add, bool dynamic, "
        "bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
        norm_quantize,
        _norm_quantize_fake,
    ),
)

for _schema, _reference, _fake in OPS:
    define(_schema, _reference, _fake)
