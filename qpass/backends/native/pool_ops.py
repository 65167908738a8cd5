"""Pooling of codes as the native kernels run it: schema, shape rule and reference, as in qpass/ops.py.

max     the largest code of a window; padding never is
mean    mean of the codes * mul + add, float or rounded to codes again; padding counts as pad_code, or not at all
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qpass.ops import define

MAXIMA = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
MEANS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def out_sizes(
    sizes: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[int, ...]:
    """The spatial sizes of a pooling's output, from those of its input, as torch has them."""
    found = []
    for i, k, s, p, d in zip(sizes, kernel, stride or kernel, padding, dilation, strict=True):
        out = (i + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        found.append(out - 1 if ceil_mode and (out - 1) * s >= i + p else out)  # no window starts behind the input
    return tuple(found)


def packed_pool(
    x: Tensor,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    pad_code: int,
    mul: float,
    add: float,
    dtype: torch.dtype,
) -> Tensor:
    """The pooled image, [B, C, *out], channels-last.

    x: u8 [B, C, *spatial]. kind: "max" (the dtype is uint8, and what follows ceil_mode is not read) or "mean" (dilation is
    1). dtype: float32, bfloat16, or uint8 for clamp(round(y), 0, 255). An empty stride is the kernel.
    """
    axes = len(kernel)
    if kind == "max":
        y = MAXIMA[axes](x.float(), kernel, stride or kernel, padding, dilation, ceil_mode)
    else:
        y = MEANS[axes](x.double() - pad_code, kernel, stride or kernel, padding, ceil_mode, count_include_pad)
        y = (y + pad_code).float() * mul + add
        y = y.round().clamp(0, 255) if dtype is torch.uint8 else y
    return y.movedim(1, -1).to(dtype).contiguous().movedim(-1, 1)


def _packed_pool_fake(
    x, kind, kernel, stride, padding, dilation, ceil_mode, count_include_pad, pad_code, mul, add, dtype
):
    sizes = out_sizes(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    return x.new_empty((x.shape[0], *sizes, x.shape[1]), dtype=dtype).movedim(-1, 1)


define(
    "packed_pool(Tensor x, str kind, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "bool count_include_pad, int pad_code, float mul, float add, ScalarType dtype) -> Tensor",
    packed_pool,
    _packed_pool_fake,
)
