"""Factors of input channels, moved between an input and the weights that read it: what is fake-quantized are the products.

    x' = (x - c) v        W' = W / v        y = Q(x') Q(W')^T + b + Q(W') (v c)

SmoothQuant (2211.10438, eq. 3), with a shift c as in Outlier Suppression+ (2304.09145, eq. 6). Without Q that is
x W^T + b, whatever v and c are. They are the plan's, and constants: gradients reach x and W through them.

    dL/dx = v dL/dx'      dL/dW = dL/dW' / v,  dL/dQ(W') = dL/dy^T (Q(x') + v c)

A module with a forward of its own gets the operands as they were instead: Q(x') / v + c and Q(W') v, of which the product is
the same. Each value is read as x by - less, with by = v, less = v c of an input, by = 1 / v of a weight.
"""

from __future__ import annotations

from torch import Tensor, autocast
from torch.nn import functional as F

from qpass.affine import math_dtype

Channels = tuple[Tensor, Tensor | None]  # by, less: float32, to broadcast against the value


def scaled(x: Tensor, channels: Channels | None) -> Tensor:
    """X by - less, in float32 (float64 where x is); x itself, in that dtype, without channels."""
    real = x.to(math_dtype(x.dtype))
    if channels is None:
        return real
    by, less = channels
    real = real * by.to(real.dtype)
    return real if less is None else real - less.to(real.dtype)


def chained(grad: Tensor, channels: Channels | None) -> Tensor:
    """dL/dx of dL/d(x by - less)."""
    return grad if channels is None else grad * channels[0].to(grad.dtype)


def undone(y: Tensor, channels: Channels) -> Tensor:
    """The x of y = x by - less."""
    by, less = channels
    return (y if less is None else y + less.to(y.dtype)) / by.to(y.dtype)


def carried(weight: Tensor, less: Tensor) -> Tensor:
    """Q(W') (v c) [N] of a weight [N, K] and v c [K], in float32 (float64 where the weight is) under autocast too."""
    real = weight.to(math_dtype(weight.dtype))
    with autocast(weight.device.type, enabled=False):
        return F.linear(less.to(real.dtype), real)
