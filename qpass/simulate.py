"""What a site computes once it is quantized, of a float input: the plan's numbers in plain torch, no graph and no kernel.

linear:        y = Q(x) W_q^T + b + b*             Q: the input's type, static, per row or per sample
convolution:   y = Q(x) * W_q + b + b*             b*: what the plan adds to the bias
lookup:        y = (W_q * m)[i]                    m: the factor of a table that is tied to a linear
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from qpass import affine, nested
from qpass.plan import Decision
from qpass.qparams import QParams
from qpass.solvers.split import layout


def real_weight(d: Decision) -> Tensor:
    """Float32: what the integers of a quantized site stand for, [N, K], or shaped as the convolution or table holds it."""
    weight = nested.real_weight(d.packed)
    return weight.t() if d.transposed else weight


def quantized_linear(
    d: Decision, x: Tensor, bias: Tensor | None, weight: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Float32 [..., N] of a float input [..., K].

    weight, real: `real_weight(d)` and `quantized_input(d, x)`, for who has them already.
    """
    weight = real_weight(d) if weight is None else weight
    real = quantized_input(d, x) if real is None else real
    bias = None if bias is None else bias.float()
    if d.bias is not None:
        bias = d.bias.to(real.device) if bias is None else bias + d.bias.to(bias.device)
    return torch.nn.functional.linear(real, weight, bias)


def quantized_convolution(
    d: Decision, x: Tensor, bias: Tensor | None, walk: tuple[Any, ...], weight: Tensor | None = None
) -> Tensor:
    """Float32 [B, N, ...] of a float input [B, C, ...]; walk: stride and what follows it in aten.convolution."""
    weight = real_weight(d) if weight is None else weight
    if d.input_type is not None:
        bias = d.bias if bias is None else bias if d.bias is None else bias.float() + d.bias.to(bias.device)
    return torch.ops.aten.convolution(quantized_input(d, x), weight, None if bias is None else bias.float(), *walk)


def quantized_lookup(d: Decision, ids: Tensor, weight: Tensor | None = None) -> Tensor:
    """Float32 [..., K], the rows of a table of integers that ids [...] name."""
    rows = torch.nn.functional.embedding(ids, real_weight(d) if weight is None else weight)
    return rows if d.packed.in_mul is None else rows * d.packed.in_mul.to(rows.device)


def scaled_input(d: Decision, x: Tensor) -> Tensor:
    """Float32, shaped as x: the input as a site quantizes it, shifted and multiplied by its factors."""
    real, factor = x.float(), d.packed.in_mul
    if factor is None:
        return real
    factor = factor.to(x.device)
    if d.operation != "linear":
        return real * factor.reshape(-1, *[1] * (x.dim() - 2))
    if d.input_shift is None:
        return real * factor
    return torch.addcmul(-d.input_shift.to(x.device) * factor, real, factor)


def quantized_input(d: Decision, x: Tensor) -> Tensor:
    """Float32, shaped as x: the input that a site multiplies by its weight, through its codes where it has a type."""
    real = scaled_input(d, x)
    return real if d.input_type is None else _through_input_type(d, real)


def _through_input_type(d: Decision, x: Tensor) -> Tensor:
    if d.input_scale is None:
        scale, zero = affine.choose_dynamic(x, d.input_type)
        return _through(x, QParams(scale, zero, d.input_type))
    params = QParams(d.input_scale, d.input_zero, d.input_type)
    params = dataclasses.replace(params, scale=params.scale.to(x.device), zero=_moved(params.zero, x))
    out = _through(x, params)
    if d.input_extra is not None:
        top = float(d.input_scale) * (d.input_type.qmax - int(d.input_zero))
        for channel, k in zip(*layout(d.input_extra), strict=True):
            out[..., channel] += _through((x[..., channel] - k * top).clamp(min=0), params)
    return out


def _moved(zero: Tensor | None, x: Tensor) -> Tensor | None:
    return None if zero is None else zero.to(x.device)


def _through(x: Tensor, params: QParams) -> Tensor:
    """`affine.fake_quantize` to the last bit, in one pass over memory less for each step (the codes stay float)."""
    qtype = params.type
    if qtype.is_float:
        return affine.fake_quantize(x, params)
    zero = 0 if params.zero is None else params.zero
    codes = x.div(params.scale).round_()
    return codes.clamp_(_bound(qtype.qmin, zero, x), _bound(qtype.qmax, zero, x)).mul_(params.scale)


def _bound(limit: int, zero: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(limit - zero, device=x.device).to(x.dtype)
