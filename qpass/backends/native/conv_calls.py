"""From a convolution or pool of a lowered graph to the Python function that calls its kernel."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import CONV, CONV_ACTIVATIONS, OUT_TYPES, POOL
from qpass.backends.native.calls import Call, kernel
from qpass.backends.native.conv_ops import pixel_stride
from qpass.backends.native.conv_pack import is_folded
from qpass.conv_ops import conv_shape
from qpass.convolutions import Geometry
from qpass.graphs import constant

POINTERS = struct.Struct("10P")  # the head of CONV
REMEMBERED = 64  # sizes of calls
OURS = (torch.ops.qpass.packed_conv.default, torch.ops.qpass.packed_max_pool.default)  # their results are channels last
CLAMPS = ("", "relu", "relu6", "cap")  # activations that only clamp: codes are written directly


def three(values: Any, fill: int) -> tuple[int, ...]:
    """One number for each of depth, height and width."""
    values = tuple(int(v) for v in values)
    return (fill,) * (3 - len(values)) + values


def conv_call(node: fx.Node) -> Call:
    """A call of qpass.packed_conv."""
    x, packed, alpha, beta, offset, slope, sample_scale, sample_zero, other, other_scale, other_zero, n = node.args[:12]
    walked: Any = node.args[12:19]
    kernel_size, stride, padding, dilation, transposed, output_padding, groups = walked
    x_zero, act, out_scale, out_zero, out_max, dtype = node.args[19:]
    g = Geometry(*map(tuple, (kernel_size, stride, padding, dilation)), transposed, tuple(output_padding), groups)
    channels = int(x.meta["val"].shape[1])
    launch, pointers = kernel("qpass_conv"), POINTERS.pack
    direct = dtype is torch.uint8 and act in CLAMPS
    if other is None or other.meta["val"].dtype is not torch.uint8:
        other_scale = 1.0
    factors, addends = _constant(alpha), _constant(beta)
    low, high, inverse = 0.0, float(out_max), 1 / out_scale
    if direct:
        factors = (factors.double() * inverse).float()
        addends = (addends.double() * inverse + out_zero).float()
        low = float(out_zero) if act else 0.0
        high = min(high, 6 * inverse + out_zero) if act == "relu6" else high
        other_scale = other_scale * inverse
    slopes = None if slope is None else _constant(slope)
    if direct and slopes is not None:
        slopes = (slopes.double() * inverse + out_zero).clamp(max=high).float()
    held = [_constant(packed), factors, addends, _constant(offset), slopes]
    w, a, b, o, s = (0 if t is None else t.data_ptr() for t in held)
    weight_shape = (channels, n // groups, *kernel_size) if transposed else (n, channels // groups, *kernel_size)
    walk = (*three(kernel_size, 1), *three(stride, 1), *three(padding[: g.axes], 0), *three(dilation, 1))
    fold = int(is_folded(channels, g))
    tail = (other_scale, float(other_zero), low, high, inverse, float(out_zero), float(out_max))
    kind, name = OUT_TYPES[dtype], CONV_ACTIVATIONS.index(act)
    single = (stride, padding, dilation, transposed, output_padding, groups)
    sure, empty, threads = x.target in OURS, empty_image(g.axes), torch.get_num_threads
    known: dict[
        Any, tuple[Any, bytes]
    ] = {}  # sizes of a call -> the shape of its result, and its arguments but the pointers

    def describe(key: tuple[Any, ...]) -> tuple[Any, bytes]:
        (batch, _, *sizes), ld, other_kind, count = key
        shape = conv_shape((batch, channels, *sizes), weight_shape, *single)[2:]
        missing = (1,) * (3 - g.axes)
        numbers = (batch, channels, n, groups, ld, *missing, *sizes, *missing, *shape, *walk)
        kinds = (int(transposed), x_zero, name, kind, other_kind, int(direct), count, fold)
        if len(known) > REMEMBERED:
            known.clear()
        known[key] = (batch, n, *shape), CONV.pack(*(0,) * 10, *numbers, *kinds, *tail)[POINTERS.size :]
        return known[key]

    def run(x: Tensor, scale: Tensor | None, zero: Tensor | None, other: Tensor | None, *, held=held) -> Tensor:
        ld = channels if sure else pixel_stride(x)
        if ld is None or (fold and ld != channels):
            x, ld = x.movedim(1, -1).contiguous().movedim(-1, 1), channels
        rows = row = addend = other_kind = 0
        if scale is not None and zero is not None:
            scale, zero = scale.contiguous(), zero.contiguous()
            row, rows = scale.data_ptr(), zero.data_ptr()
        if other is not None:
            other = other.movedim(1, -1).contiguous()
            addend, other_kind = other.data_ptr(), OUT_TYPES[other.dtype]
        key = (x.shape, ld, other_kind, threads())
        shape, rest = known.get(key) or describe(key)
        out = empty(shape, dtype)
        launch(pointers(x.data_ptr(), w, a, b, s, row, o, rows, addend, out.data_ptr()) + rest)
        return out

    return run, (x, sample_scale, sample_zero, other)


def empty_image(axes: int) -> Callable[[Any, torch.dtype], Tensor]:
    """What makes an uninitialised [B, C, *spatial] tensor that lies channels last."""
    if axes == 2:
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    if axes == 3:
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, memory_format=torch.channels_last_3d)
    return lambda shape, dtype: torch.empty((shape[0], shape[2], shape[1]), dtype=dtype).movedim(-1, 1)


def max_pool_call(node: fx.Node) -> Call:
    """A call of qpass.packed_max_pool."""
    x, size, stride, padding, dilation, ceil_mode = node.args
    stride = stride or size
    launch, pack = kernel("qpass_pool"), POOL.pack
    walk = (*three(size, 1), *three(stride, 1), *three(padding, 0), *three(dilation, 1))
    axes = len(size)
    shape_of = pooled_shape(size, stride, padding, dilation, ceil_mode)

    def run(x: Tensor) -> Tensor:
        image = x.movedim(1, -1)
        if not image.is_contiguous():
            image = image.contiguous()
        batch, *sizes, channels = image.shape
        shape = shape_of(sizes)
        out = torch.empty((batch, *shape, channels), dtype=torch.uint8)
        missing = (1,) * (3 - axes)
        sizes = (batch, channels, *missing, *sizes, *missing, *shape, *walk)
        launch(pack(image.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads()))
        return out.movedim(-1, 1)

    return run, (x,)


def pooled_shape(kernel_size, stride, padding, dilation, ceil_mode: bool) -> Callable[[list[int]], list[int]]:
    """Spatial sizes -> those of a pool's result, as torch counts them: with ceil_mode no window begins in the padding."""

    def shape(sizes: list[int]) -> list[int]:
        found = []
        for size, k, s, p, d in zip(sizes, kernel_size, stride, padding, dilation, strict=True):
            room = size + 2 * p - d * (k - 1) - 1
            count = (-(-room // s) if ceil_mode else room // s) + 1
            found.append(count - 1 if ceil_mode and (count - 1) * s >= size + p else count)
        return found

    return shape


def _constant(node: fx.Node) -> Tensor:
    value = constant(node)
    assert value is not None
    return value


CALLS = (
    (torch.ops.qpass.packed_conv.default, conv_call),
    (torch.ops.qpass.packed_max_pool.default, max_pool_call),
)
