"""Fake quantization as one node of the autograd graph: a value as it comes back from its codes, with chosen subgradients.

    y = (clamp(round(x / s) + z, low, high) - z) s

`channels=` multiplies and shifts x before, by channel (channels.py); y stays multiplied.

The gradient of a step is the sum over its elements times 1 / sqrt(N high), that of its offset too; N is the number of its
weights, or of the features of one sample (LSQ, 1902.08153, section 2.2), so that micro-batches and processes add up to the
gradient of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.qat.arithmetic import backward, forward, gradient_scale
from qpass.qat.channels import Channels
from qpass.qat.fused import LARGE, fused
from qpass.qat.product import Codes, no_view
from qpass.qat.subgradients.subgradient import Subgradient
from qpass.qtype import QType


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        qtype: QType,
        rule: Subgradient,
        dtype: torch.dtype,
        parameter: bool,
        by: Tensor | None,
        less: Tensor | None,
        coded: bool,
    ) -> tuple[Tensor, Tensor | None]:
        zero, channels = whole(offset, qtype), None if by is None else (by, less)
        stays = parameter or kept_anyway(x)
        y, code, q = fused(forward, x, step, zero, qtype, dtype, not stays, channels, coded)
        ctx.save_for_backward(x if stays else code, step, zero, by, less)
        ctx.qtype, ctx.rule, ctx.dtype = qtype, rule, x.dtype
        ctx.samples = 1 if parameter or x.dim() < 2 else len(x)
        if q is not None:
            ctx.mark_non_differentiable(q)
        return no_view(y), q

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        seen, step, zero, by, less = ctx.saved_tensors
        channels = None if by is None else (by, less)
        found, to_step, to_offset = fused(backward, grad, seen, step, zero, ctx.qtype, ctx.rule, ctx.dtype, channels)
        scale = gradient_scale(seen.numel(), ctx.samples * step.numel(), ctx.qtype)
        sums = (None if t is None else (t * scale).to(torch.float32) for t in (to_step, to_offset))
        return found, *sums, *[None] * 7


def fake_quantize(
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    qtype: QType,
    rule: Subgradient,
    dtype: torch.dtype | None = None,
    parameter: bool = False,
    channels: Channels | None = None,
    coded: bool = False,
) -> Tensor:
    """y, in the shape of x and in dtype (that of x unless given).

    step, offset: float32, shaped as `scale_shape` says; the offset is rounded, and None where the type is symmetric.
    parameter: whether x is one, and so still there in the backward pass, as what is `kept_anyway` is; of another x one byte
    an element is kept. channels: constants that no one writes to before the backward pass. coded: the result has its integers
    as `codes`, for a product to keep them in its stead (product.py).
    """
    dtype = dtype or x.dtype
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, step, offset)):
        of_channels = channels or (None, None)
        y, q = _FakeQuantize.apply(x, step, offset, qtype, rule, dtype, parameter, *of_channels, coded)
        if q is not None:
            y.codes = Codes(q, step.detach(), whole(offset, qtype), qtype)
        return y
    return fused(forward, x, step, whole(offset, qtype), qtype, dtype, False, channels)[0]


def kept_anyway(x: Tensor) -> bool:
    """Whether x is large and the operation that made it, a ReLU say, keeps it for its own backward pass: here it is free."""
    return x.numel() >= LARGE and not torch.compiler.is_compiling() and hasattr(type(x.grad_fn), "_saved_result")


def whole(offset: Tensor | None, qtype: QType) -> Tensor | None:
    """The zero point that an offset stands for: the nearest code, in float."""
    return None if offset is None else torch.round(offset).clamp(qtype.qmin, qtype.qmax)
