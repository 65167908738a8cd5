"""What a site computes once it is quantized, of a float input: the plan's numbers in plain torch, no graph and no kernel.

linear:        y = Q(x) W_q^T + b + b*             Q: the input's type, static, per row or per sample
convolution:   y = Q(x) * W_q + b + b*             b*: what the plan adds to the bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass import affine
from qpass.plan import Decision
from qpass.qtype import QParams
from qpass.solvers.split import layout


def quantized_linear(d: Decision, x: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 [..., N] of a float input [..., K]."""
    packed = d.packed
    weight = affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
    weight = weight.t() if d.transposed else weight
    real = x.float() if packed.in_mul is None else x.float() * packed.in_mul
    if d.input_shift is not None:
        real = real - d.input_shift * packed.in_mul
    if d.input_type is not None:
        real = _through_input_type(d, real)
    y = torch.nn.functional.linear(real, weight, None if bias is None else bias.float())
    return y if d.bias is None else y + d.bias


def quantized_convolution(d: Decision, x: Tensor, bias: Tensor | None, walk: tuple[Any, ...]) -> Tensor:
    """Float32 [B, N, ...] of a float input [B, C, ...]; walk: stride and what follows it in aten.convolution."""
    packed = d.packed
    weight = affine.dequantize(packed.data, packed.scale, None, packed.type)
    real = x.float()
    if packed.in_mul is not None:
        real = real * packed.in_mul.reshape(-1, *[1] * (x.dim() - 2))
    if d.input_type is not None:
        real = _through_input_type(d, real)
        bias = d.bias if bias is None else bias if d.bias is None else bias.float() + d.bias
    return torch.ops.aten.convolution(real, weight, None if bias is None else bias.float(), *walk)


def _through_input_type(d: Decision, x: Tensor) -> Tensor:
    if d.input_scale is None:
        scale, zero = affine.choose_dynamic(x, d.input_type)
        return affine.fake_quantize(x, QParams(scale, zero, d.input_type))
    params = QParams(d.input_scale, d.input_zero, d.input_type)
    out = affine.fake_quantize(x, params)
    if d.input_extra is not None:
        top = float(d.input_scale) * (d.input_type.qmax - int(d.input_zero))
        for channel, k in zip(*layout(d.input_extra), strict=True):
            out[..., channel] += affine.fake_quantize((x[..., channel] - k * top).clamp(min=0), params)
    return out
