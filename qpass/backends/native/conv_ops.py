"""The ops of the native convolution and pooling kernels: schema, shape rule and reference.

Images are logically [B, C, *spatial] and lie channels last, results too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qpass.backends.native.conv_pack import unpack_conv
from qpass.conv_ops import activate, conv_shape
from qpass.convolutions import Geometry
from qpass.ops import define

aten = torch.ops.aten


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
    """Y = act((convolution(x - zero, w)) * alpha * sample_scale + beta + other), [B, N, *out].

    x: u8 [B, C, *spatial]; its zero point is x_zero, or sample_zero int32 [B, 1, ...] with sample_scale float32.
    packed: w int8 as conv_pack.py says. alpha, beta, slope (of prelu; the bounds of cap): float32 [N]. offset: int32
    [phases, N], what the zero point adds to each sum; for one zero point in all it is times x_zero already. other:
    [B, N, *out] float32, bfloat16, or u8 of other_scale and other_zero. padding: one number for each axis, or those in
    front of each and then those behind. dtype: float32, bfloat16, or uint8 for codes of out_scale and out_zero, at most
    out_max.
    """
    g = Geometry(*map(tuple, (kernel, stride, padding, dilation)), transposed, tuple(output_padding), groups)
    weight = unpack_conv(packed, x.shape[1], n, g)
    if transposed:
        by_group = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
        weight = by_group.flatten(0, 1)
    centred = x.to(torch.float64) - (x_zero if sample_zero is None else sample_zero)
    if len(padding) > g.axes:
        widths = [padding[side * g.axes + axis] for axis in reversed(range(g.axes)) for side in (0, 1)]
        centred, padding = functional.pad(centred, widths), [0] * g.axes
    total = aten.convolution(
        centred, weight.to(torch.float64), None, stride, padding, dilation, transposed, output_padding, groups
    )
    shape = [-1 if axis == 1 else 1 for axis in range(total.dim())]
    y = total.float() * alpha.reshape(shape)
    y = (y if sample_scale is None else y * sample_scale) + beta.reshape(shape)
    if other is not None:
        y = y + ((other.float() - other_zero) * other_scale if other.dtype is torch.uint8 else other.float())
    y = activate(y, act, slope)
    if dtype is torch.uint8:
        y = ((y / out_scale).round() + out_zero).clamp(0, out_max)
    return channels_last(y.to(dtype))


def channels_last(x: Tensor) -> Tensor:
    """The same values, [B, C, ...] lying as [B, ..., C]."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def pixel_stride(x: Tensor) -> int | None:
    """Elements from a pixel to the next of an image that lies channels last, alone or as some channels of a wider
    one; else None.
    """
    if x.stride(1) != 1 and x.shape[1] != 1:
        return None
    found, expected = None, None
    for axis in (*range(x.dim() - 1, 1, -1), 0):
        if x.shape[axis] == 1:
            continue
        if expected is None:
            found = expected = x.stride(axis)
        elif x.stride(axis) != expected:
            return None
        expected = expected * x.shape[axis]
    return x.shape[1] if found is None else found if found >= x.shape[1] else None


def _image(x: Tensor, batch, channels: int, sizes, dtype: torch.dtype) -> Tensor:
    return x.new_empty((batch, *sizes, channels), dtype=dtype).movedim(-1, 1)


def _packed_conv_fake(x, packed, alpha, beta, offset, slope, sample_scale, sample_zero, other, other_scale,
other_zero, n, kernel,
                      stride, padding, dilation, transposed, output_padding, groups, x_zero, act, out_scale, out_zero,
                      out_max, dtype):  # fmt: skip
    weight = (x.shape[1], n // groups, *kernel) if transposed else (n, x.shape[1] // groups, *kernel)
    batch, _, *sizes = conv_shape(x.shape, weight, stride, padding, dilation, transposed, output_padding, groups)
    return _image(x, batch, n, sizes, dtype)


def packed_max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """The largest code of each window, u8 [B, C, *out]."""
    return channels_last(torch.ops.qpass.max_pool.default(x, kernel, stride, padding, dilation, ceil_mode))


def _packed_max_pool_fake(x, kernel, stride, padding, dilation, ceil_mode):
    batch, channels, *sizes = torch.ops.qpass.max_pool.default(x, kernel, stride, padding, dilation, ceil_mode).shape
    return _image(x, batch, channels, sizes, x.dtype)


OPS = (
    (
        "packed_conv(Tensor x, Tensor packed, Tensor alpha, Tensor beta, Tensor offset, Tensor? slope, Tensor? sample_scale, "
        "Tensor? sample_zero, Tensor? other, float other_scale, int other_zero, int n, int[] kernel, int[] stride, "
        "int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, int x_zero, str act, "
        "float out_scale, int out_zero, int out_max, ScalarType dtype) -> Tensor",
        packed_conv,
        _packed_conv_fake,
    ),
    (
        "packed_max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
        packed_max_pool,
        _packed_max_pool_fake,
    ),
)

for _schema, _reference, _fake in OPS:
    define(_schema, _reference, _fake)
