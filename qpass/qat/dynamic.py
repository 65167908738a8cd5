"""Fake quantization of values that give each of their rows or images a step of its own, from its own range.

    s = c (hi - lo) / n,   z = round(-lo n / (hi - lo)),   y = (clamp(round(x / s) + z, 0, n) - z) s

c is the clip, one number for all rows: at few bits a shorter range is finer where most values lie, at the price of its ends
(QuaRot, 2404.00456, has c = .9). It is learned as steps are, by the rule of the method:

    dL/dc = sum dL/dy dy/ds ds/dc,   ds/dc = s / c

over all values, times 1 / sqrt(N n) as a step's (fake_quantize.py). Without a clip no value is outside of its range; dL/dy
is passed on, and nothing is kept. lo and hi are constants to the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass import affine
from qpass.affine import math_dtype
from qpass.qat.arithmetic import backward, forward, gradient_scale
from qpass.qat.channels import Channels, chained, scaled
from qpass.qat.fused import fused
from qpass.qat.product import Codes, no_view
from qpass.qat.subgradients.subgradient import Subgradient
from qpass.qtype import QType


class _Dynamic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qtype: QType, dtype: torch.dtype, by: Tensor | None, less: Tensor | None
    ) -> Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(by)
        return no_view(fused(dynamic, x, None, qtype, dtype, False, None if by is None else (by, less))[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (by,) = ctx.saved_tensors
        found = grad.to(ctx.dtype) if by is None else fused(passed_on, grad, ctx.dtype, (by, None))
        return found, None, None, None, None


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_clip: Tensor,
        qtype: QType,
        rule: Subgradient,
        dtype: torch.dtype,
        by: Tensor | None,
        less: Tensor | None,
        coded: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        channels = None if by is None else (by, less)
        y, code, q, step, zero = fused(dynamic, x, log_clip, qtype, dtype, True, channels, coded)
        ctx.save_for_backward(code, step, zero, by, less)
        ctx.qtype, ctx.rule, ctx.dtype = qtype, rule, x.dtype
        ctx.samples = 1 if x.dim() < 2 else len(x)
        ctx.mark_non_differentiable(*(t for t in (q, step, zero) if t is not None))
        return no_view(y), q, step, zero

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        code, step, zero, by, less = ctx.saved_tensors
        channels = None if by is None else (by, less)
        found, to_step, _ = fused(backward, grad, code, step, zero, ctx.qtype, ctx.rule, ctx.dtype, channels)
        to_clip = (to_step * step).sum() * gradient_scale(code.numel(), ctx.samples, ctx.qtype)
        return found, to_clip.to(torch.float32), *[None] * 6


def passed_on(grad: Tensor, dtype: torch.dtype, channels: Channels) -> Tensor:
    """dL/dx in dtype, of values with channels."""
    return chained(grad.to(math_dtype(dtype)), channels).to(dtype)


def dynamic(
    x: Tensor,
    log_clip: Tensor | None,
    qtype: QType,
    dtype: torch.dtype,
    coded: bool = False,
    channels: Channels | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(y, code and q of `arithmetic.forward`, step, zero point in float) of a value. log_clip: None where the clip is 1."""
    x = scaled(x, channels)
    step, zero = affine.choose_dynamic(x, qtype)
    step = step if log_clip is None else step * log_clip.exp().to(torch.float32)
    zero = None if zero is None else zero.to(torch.float32)
    return *forward(x, step, zero, qtype, dtype, coded, None, whole), step, zero


def fake_quantize_dynamic(
    x: Tensor,
    qtype: QType,
    dtype: torch.dtype | None = None,
    channels: Channels | None = None,
    log_clip: Tensor | None = None,
    rule: Subgradient | None = None,
    coded: bool = False,
) -> Tensor:
    """y, in the shape of x and in dtype (that of x unless given). log_clip: ln c, a float32 number; None where it is 1.

    rule: of the clip. coded: the result has its integers as `codes`, for a product to keep them in its stead (product.py).
    """
    dtype = dtype or x.dtype
    of_channels = channels or (None, None)
    if torch.is_grad_enabled() and log_clip is None and x.requires_grad:
        return _Dynamic.apply(x, qtype, dtype, *of_channels)
    if torch.is_grad_enabled() and log_clip is not None and (x.requires_grad or log_clip.requires_grad):
        assert rule is not None
        y, q, step, zero = _Clipped.apply(x, log_clip, qtype, rule, dtype, *of_channels, coded)
        if q is not None:
            y.codes = Codes(q, step, zero, qtype)
        return y
    return fused(dynamic, x, log_clip, qtype, dtype, False, channels)[0]
