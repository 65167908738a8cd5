"""The convolution that the native kernels run: schema, shape rule and reference, as in qpass/ops.py.

    y = act((conv(x padded with zero points) - zero * offset) * alpha * sample_scale + beta + other)

Padding holds the zero point, so that it is a real 0 and the offset, the sum of a channel's weights, is exact everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qpass.backends.native.conv_pack import ungrouped, unpack_conv
from qpass.ops import ACTIVATIONS, define

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}

CONV_ACTIVATIONS = (
    *ACTIVATIONS,
    ("relu6", functional.relu6),
    ("hardswish", functional.hardswish),
    ("hardsigmoid", functional.hardsigmoid),
    ("sigmoid", torch.sigmoid),
    ("prelu", None),  # has slopes
)


def out_sizes(
    sizes: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
) -> tuple[int, ...]:
    """The spatial sizes of a convolution's output, from those of its input."""
    axes = zip(sizes, kernel, stride, padding, dilation, output_padding or [0] * len(kernel), strict=True)
    if transposed:
        return tuple((i - 1) * s - 2 * p + d * (k - 1) + extra + 1 for i, k, s, p, d, extra in axes)
    return tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d, _ in axes)


def packed_conv(
    x: Tensor,
    packed: Tensor,
    alpha: Tensor,
    beta: Tensor,
    offset: Tensor,
    slope: Tensor | None,
    sample_scale: Tensor | None,
    sample_zero: Tensor | None,
    other: Tensor | None,
    other_scale: float,
    other_zero: int,
    n: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    x_zero: int,
    act: str,
    out_scale: float,
    out_zero: int,
    out_max: int,
    dtype: torch.dtype,
) -> Tensor:
    """Y = act((conv(x) - zero * offset) * alpha * sample_scale + beta + other), [B, N, *out], channels-last.

    x: u8 [B, C, *spatial]. packed: int8, of pack_conv. alpha, beta: float32 [N]. offset: int32 [N], each channel's sum of
    weights; times x_zero where there is no sample_zero. sample_scale float32, sample_zero int32: [B, 1, ..]. slope: float32
    [N], of prelu. other: [B, N, *out], float32, bfloat16, or uint8 codes of other_scale and other_zero. dtype: float32,
    bfloat16, or uint8 for codes up to out_max of out_scale and out_zero. output_padding: transposed convolutions only.
    """
    split = unpack_conv(packed, x.shape[1], n, kernel, groups, transposed)
    weight, zero = ungrouped(split, transposed).double(), x_zero if sample_zero is None else sample_zero.double()
    along = (-1, *[1] * len(kernel))
    if transposed:
        convolve, tail = TRANSPOSED[len(kernel)], (stride, padding, output_padding, groups, dilation)
    else:
        convolve, tail = CONVOLUTIONS[len(kernel)], (stride, padding, dilation, groups)
    total = convolve(x.double() - zero, weight, None, *tail)
    share = zero * split.double().flatten(2).sum(2).view(along)  # of the zero point in a sum over all taps
    total = total + share - offset.view(along) * (1 if sample_zero is None else zero)
    y = total.float() * alpha.view(along)
    y = (y if sample_scale is None else y * sample_scale) + beta.view(along)
    if other is not None:
        y = y + ((other.float() - other_zero) * other_scale if other.dtype is torch.uint8 else other.float())
    y = functional.prelu(y, slope) if act == "prelu" else dict(CONV_ACTIVATIONS)[act](y)
    if dtype is torch.uint8:
        y = ((y / out_scale).round() + out_zero).clamp(0, out_max)
    return y.movedim(1, -1).to(dtype, memory_format=torch.contiguous_format).contiguous().movedim(-1, 1)


def _packed_conv_fake(x, packed, alpha, beta, offset, slope, sample_scale, sample_zero, other, other_scale, other_zero, n,
                      kernel, stride, padding, dilation, transposed, output_padding, groups, x_zero, act, out_scale,
                      out_zero, out_max, dtype):  # fmt: skip
    sizes = out_sizes(x.shape[2:], kernel, stride, padding, dilation, transposed, output_padding)
    return x.new_empty((x.shape[0], *sizes, n), dtype=dtype).movedim(-1, 1)


define(
    "packed_conv(Tensor x, Tensor packed, Tensor alpha, Tensor beta, Tensor offset, Tensor? slope, Tensor? sample_scale, "
    "Tensor? sample_zero, Tensor? other, float other_scale, int other_zero, int n, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, int x_zero, str act, "
    "float out_scale, int out_zero, int out_max, ScalarType dtype) -> Tensor",
    packed_conv,
    _packed_conv_fake,
)
