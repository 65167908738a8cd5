"""The product of a fake-quantized input, kept for the backward pass as codes, not as values.

    y = x_q W^T + b         x_q = (q - z) s: [.., K], kept as q, one byte an element in place of two or four
    dL/dx_q = g W
    dL/dW   = g^T x_q       x_q of its codes anew, the same to the last bit

So an input costs the two bytes of q and of what its step's gradient needs (arithmetic.py): what bfloat16 would take.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.qat.arithmetic import values
from qpass.qat.fused import fused
from qpass.qtype import QType


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: Codes) -> Tensor:
        ctx.save_for_backward(codes.q, codes.step, codes.zero, weight)
        ctx.type, ctx.dtype, ctx.bias = codes.type, x.dtype, None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

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
