"""The convolution and the pooling of a quantized graph: schema, shape rule and reference, as in ops.py.

As the reference of `linear`, that of `conv` accumulates the integers in float64, which is exact, and rounds once to float32;
off the CPU in float32 (`ops.summing`).
Padded positions hold the zero point, so they are an exact 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qpass import affine
from qpass.ops import activation, define, summing
from qpass.qtype import QType

aten = torch.ops.aten


def conv(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    x_type: str,
    weight: Tensor,
    weight_scale: Tensor,
    weight_type: str,
    bias: Tensor | None,
    other: Tensor | None,
    other_scale: Tensor | None,
    other_zero: Tensor | None,
    other_type: str,
    act: str,
    slope: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    out_type: str,
    out_dtype: torch.dtype,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """Y = act(convolution(dequantize(x), dequantize(weight)) + bias + dequantize(other)), quantized where out_type is given.

    x: [B, C, *spatial], integers of x_type, per tensor or per sample. weight: int8 [N, C / groups, *kernel] of scales [N], or
    [C, N / groups, *kernel] of scales [N / groups] where transposed. bias: [N]; slope: [N], of prelu, or the bounds of
    cap. other: [B, N, *out], integers of other_type or float. Returns [B, N, *out], contiguous,
    in out_dtype or in out_type's storage.
    """
    wide = summing(x.device)
    centred = x.to(wide) if x_zero is None else x.to(wide) - x_zero
    total = aten.convolution(
        centred, weight.to(wide), None, stride, padding, dilation, transposed, output_padding, groups
    )
    assert x_scale is not None
    y = (total * (x_scale.to(wide) * _per_channel(channel_scales(weight_scale, total.shape[1]), total))).float()
    if bias is not None:
        y = y + _per_channel(bias, y).to(y.dtype)
    if other is not None:
        if other_type:
            other = affine.dequantize(other, other_scale, other_zero, QType.parse(other_type))  # pyright: ignore[reportArgumentType]
        y = y + other.to(y.dtype)
    y = activate(y, act, slope)
    if out_type:
        return affine.quantize(y, out_scale, out_zero, QType.parse(out_type)).contiguous()  # pyright: ignore[reportArgumentType]
    return y.to(out_dtype).contiguous()


def activate(y: Tensor, act: str, slope: Tensor | None) -> Tensor:
    """An activation by name; slope: [N] or [N, 1, ...], those of prelu, the bounds of cap: min(max(y, 0), slope)."""
    if slope is None:
        return activation(act)(y)
    if act == "cap":
        return torch.minimum(functional.relu(y), _per_channel(slope.to(y.dtype), y))
    return functional.prelu(y, slope.to(y.dtype))


def channel_scales(scale: Tensor, channels: int) -> Tensor:
    """The scale of each output channel, [N]: one for all, one each, or one each within a group of a transposed weight."""
    return scale.expand(channels) if scale.dim() == 0 else scale.repeat(channels // scale.shape[0])


def _per_channel(values: Tensor, y: Tensor) -> Tensor:
    return values.reshape([-1 if axis == 1 else 1 for axis in range(y.ndim)])


def _conv_fake(x, x_scale, x_zero, x_type, weight, weight_scale, weight_type, bias, other, other_scale, other_zero,
other_type,
               act, slope, out_scale, out_zero, out_type, out_dtype, stride, padding, dilation, transposed, output_padding,
               groups):  # fmt: skip
    shape = conv_shape(x.shape, weight.shape, stride, padding, dilation, transposed, output_padding, groups)
    return x.new_empty(shape, dtype=QType.parse(out_type).storage if out_type else out_dtype)


def conv_shape(x, weight, stride, padding, dilation, transposed: bool, output_padding, groups: int) -> list:
    """Shape of a convolution's result. x: [B, C, *spatial]; weight as in `conv`; sizes may be symbols. padding: one
    number for each axis, or those in front of each and then those behind.
    """
    found = [x[0], weight[1] * groups if transposed else weight[0]]
    for i, size in enumerate(x[2:]):
        reach = dilation[i] * (weight[2 + i] - 1)
        both = padding[i] + padding[i - len(x) + 2]
        if transposed:
            found.append((size - 1) * stride[i] - both + reach + output_padding[i] + 1)
        else:
            found.append((size + both - reach - 1) // stride[i] + 1)
    return found


def max_pool(
    q: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """The largest code of each window: the maximum commutes with quantizing. q: uint8 [B, C, *spatial]; returns uint8."""
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    return pool(q.float(), kernel, stride or kernel, padding, dilation, ceil_mode).to(q.dtype).contiguous()


def _max_pool_fake(q, kernel, stride, padding, dilation, ceil_mode):
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    return q.new_empty(pool(q.float(), kernel, stride or kernel, padding, dilation, ceil_mode).shape)


def pad(q: Tensor, amounts: list[int], value: int) -> Tensor:
    """Codes with `value` around them, contiguous. amounts: before and after of each axis, from the last on, as
    torch's pad.
    """
    return functional.pad(q, amounts, value=value).contiguous()


def _pad_fake(q, amounts, value):
    shape = list(q.shape)
    for i in range(len(amounts) // 2):
        shape[-1 - i] = shape[-1 - i] + amounts[2 * i] + amounts[2 * i + 1]
    return q.new_empty(shape)


OPS = (
    (
        "conv(Tensor x, Tensor? x_scale, Tensor? x_zero, str x_type, Tensor weight, Tensor weight_scale, str weight_type, "
        "Tensor? bias, Tensor? other, Tensor? other_scale, Tensor? other_zero, str other_type, str act, Tensor? slope, "
        "Tensor? out_scale, Tensor? out_zero, str out_type, ScalarType out_dtype, int[] stride, int[] padding, "
        "int[] dilation, bool transposed, int[] output_padding, int groups) -> Tensor",
        conv,
        _conv_fake,
    ),
    (
        "max_pool(Tensor q, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
        max_pool,
        _max_pool_fake,
    ),
    ("pad(Tensor q, int[] amounts, int value) -> Tensor", pad, _pad_fake),
)

for _schema, _reference, _fake in OPS:
    define(_schema, _reference, _fake)
