"""The product of a fake-quantized input, kept for the backward pass as codes, not as values.

    y = x_q W^T + b         x_q = (q - z) s: [.., K], kept as q, one byte an element in place of two or four
    dL/dx_q = g W
    dL/dW   = g^T x_q       x_q of its codes anew, the same to the last bit

A convolution's is kept in the same way, [N, C, ..], where torch pads it with zeros, as much on either side.

So an input costs the two bytes of q and of what its step's gradient needs (arithmetic.py): what bfloat16 would take.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.qat.arithmetic import values
from qpass.qat.fused import fused
from qpass.qtype import QType

CONVOLUTIONS = F.conv1d, F.conv2d, F.conv3d
OWN = [kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]  # a class of a user's may have another


class Codes(NamedTuple):
    """What a fake-quantized tensor came from: q in the type's own integers, float32 step and zero point (or None)."""

    q: Tensor
    step: Tensor
    zero: Tensor | None
    type: QType


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, of a fake-quantized input [.., K] and weight [N, K]; of an input with codes, those are what is kept."""
    codes: Codes | None = getattr(input, "codes", None)
    if codes is None or not torch.is_grad_enabled() or not weight.requires_grad:
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, codes)


def convolution(module: nn.Module, input: Tensor, weight: Tensor) -> Tensor:
    """What a Conv1d, Conv2d or Conv3d gives of a fake-quantized input [N, C, ..] or [C, ..] and weight, as `linear`."""
    codes: Codes | None = getattr(input, "codes", None)
    padding = _padding(module)
    kept = codes is not None and torch.is_grad_enabled() and weight.requires_grad
    if not kept or padding is None or input.dim() != weight.dim() or type(module)._conv_forward not in OWN:
        return module._conv_forward(input, weight, module.bias)
    return _Conv.apply(input, weight, module.bias, codes, module.stride, padding, module.dilation, module.groups)


def _padding(module: nn.Module) -> tuple[int, ...] | None:
    """Zeros on either side of each axis; None where it is not that."""
    if module.padding_mode != "zeros":
        return None
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(zeros % 2 for zeros in both) else tuple(zeros // 2 for zeros in both)
    return module.padding


def no_view(y: Tensor) -> Tensor:
    """The result of a function of ours, which a model may write to: torch forbids that where it is made as a view."""
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    return torch.ops.aten._unsafe_view(y, y.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes) -> Tensor:
        ctx.save_for_backward(codes.q, codes.step, codes.zero, weight)
        ctx.type, ctx.dtype, ctx.bias = codes.type, x.dtype, None if bias is None else bias.dtype
        return no_view(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, step, zero, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            x = fused(values, q, step, zero, ctx.type, ctx.dtype) if to_weight else None
            return (
                (rows @ weight).reshape(q.shape) if to_x else None,
                rows.t() @ x.reshape(-1, x.shape[-1]) if x is not None else None,
                rows.sum(0).to(ctx.bias) if to_bias else None,
                None,
            )


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes, *how: Any) -> Tensor:
        ctx.save_for_backward(codes.q, codes.step, codes.zero, weight)
        ctx.type, ctx.dtype, ctx.bias, ctx.how = codes.type, x.dtype, None if bias is None else bias.dtype, how
        return no_view(CONVOLUTIONS[x.dim() - 3](x, weight, bias, *how))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, step, zero, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        stride, padding, dilation, groups = ctx.how
        with torch.autocast(grad.device.type, enabled=False):
            x = fused(values, q, step, zero, ctx.type, ctx.dtype)
            found = torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                [weight.shape[0]],
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                [to_x, to_weight, to_bias],
            )
        by_x, by_weight, by_bias = found
        return by_x, by_weight, None if by_bias is None else by_bias.to(ctx.bias), *[None] * 5
