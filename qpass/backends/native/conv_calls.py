"""From a convolution or pool of a lowered graph to the Python function that calls its kernel."""

from __future__ import annotations

import math
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
LARGEST = 2.0**31
REMEMBERED = 64  # sizes of calls
OURS = (torch.ops.qpass.packed_conv.default, torch.ops.qpass.packed_max_pool.default)  # their results are channels last
CLAMPS = ("", "relu", "relu6", "cap")  # activations that only clamp: codes are written directly


def three(values: Any, fill: int) -> tuple[int, ...]:
    """One number for each of depth, height and width."""
    values = tuple(int(v) for v in values)
    return (fill,) * (3 - len(values)) + values


class ConvBlock:
    """The argument block of one qpass.packed_conv but for what a call brings: sizes, addresses of images, threads."""

    def __init__(self, node: fx.Node) -> None:
        x, packed, alpha, beta, offset, slope, _, _, other, other_scale, other_zero, n = node.args[:12]
        walked: Any = node.args[12:19]
        kernel_size, stride, padding, dilation, transposed, output_padding, groups = walked
        x_zero, act, out_scale, out_zero, out_max, dtype = node.args[19:]
        self.geometry = g = Geometry(
            *map(tuple, (kernel_size, stride, padding, dilation)), transposed, tuple(output_padding), groups
        )
        self.channels, self.n, self.dtype = int(x.meta["val"].shape[1]), n, dtype
        self.fold = is_folded(self.channels, g)
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
        # 255 * 127 of each product, the largest factor: beyond int32 a code is clamped before it is rounded
        reach = 255 * 127 * math.prod(g.kernel) * self.channels // (1 if transposed else groups)
        most = reach * float(factors.abs().max()) + float(addends.abs().max()) + 256 * abs(other_scale) if n else 0.0
        bounded = most < LARGEST and node.args[6] is None  # scales of images are not known yet
        self.held = [_constant(packed), factors, addends, _constant(offset), slopes]
        self.constants = [0 if t is None else t.data_ptr() for t in self.held]
        grouped = (self.channels, n // groups) if transposed else (n, self.channels // groups)
        self._weight_shape = (*grouped, *kernel_size)
        self._walk = (*three(kernel_size, 1), *three(stride, 1), *three(padding[: g.axes], 0), *three(dilation, 1))
        self._single = (stride, padding, dilation, transposed, output_padding, groups)
        self._head = (int(transposed), x_zero, CONV_ACTIVATIONS.index(act), OUT_TYPES[dtype])
        self._direct = int(direct) * (1 + bounded)
        self._tail = (other_scale, float(other_zero), low, high, inverse, float(out_zero), float(out_max))

    def pointers(self, x: int = 0, row: int = 0, rows: int = 0, other: int = 0, out: int = 0) -> tuple[int, ...]:
        """The head of the block: addresses in the order of struct Conv."""
        w, a, b, o, s = self.constants
        return x, w, a, b, s, row, o, rows, other, out

    def describe(self, batch: int, sizes, ld: int, other_kind: int, threads: int) -> tuple[tuple[int, ...], bytes]:
        """The shape of the result, and the block with no address of an image in it.

        sizes: of x. ld: elements from a pixel of it to the next. other_kind: index of OUT_TYPES, or -1.
        """
        g = self.geometry
        shape = conv_shape((batch, self.channels, *sizes), self._weight_shape, *self._single)[2:]
        missing = (1,) * (3 - g.axes)
        numbers = (batch, self.channels, self.n, g.groups, ld, *missing, *sizes, *missing, *shape, *self._walk)
        kinds = (*self._head, max(other_kind, 0), self._direct, threads, int(self.fold))
        return (batch, self.n, *shape), CONV.pack(*self.pointers(), *numbers, *kinds, *self._tail)


def conv_call(node: fx.Node) -> Call:
    """A call of qpass.packed_conv."""
    x, sample_scale, sample_zero, other = node.args[0], *node.args[6:9]
    block = ConvBlock(node)
    channels, dtype, fold = block.channels, block.dtype, block.fold
    launch, pointers = kernel("qpass_conv"), POINTERS.pack
    sure, empty, threads = x.target in OURS, empty_image(block.geometry.axes), torch.get_num_threads
    known: dict[Any, tuple[Any, bytes]] = {}  # sizes of a call -> the shape of its result, and all but the pointers

    def describe(key: tuple[Any, ...]) -> tuple[Any, bytes]:
        (batch, _, *sizes), ld, other_kind, count = key
        shape, packed = block.describe(batch, sizes, ld, other_kind, count)
        if len(known) > REMEMBERED:
            known.clear()
        known[key] = shape, packed[POINTERS.size :]
        return known[key]

    def run(x: Tensor, scale: Tensor | None, zero: Tensor | None, other: Tensor | None) -> Tensor:
        ld = channels if sure else pixel_stride(x)
        if ld is None or (fold and ld != channels):
            x, ld = x.movedim(1, -1).contiguous().movedim(-1, 1), channels
        rows = row = addend = 0
        other_kind = -1
        if scale is not None and zero is not None:
            scale, zero = scale.contiguous(), zero.contiguous()
            row, rows = scale.data_ptr(), zero.data_ptr()
        if other is not None:
            other = other.movedim(1, -1).contiguous()
            addend, other_kind = other.data_ptr(), OUT_TYPES[other.dtype]
        key = (x.shape, ld, other_kind, threads())
        shape, rest = known.get(key) or describe(key)
        out = empty(shape, dtype)
        launch(pointers(*block.pointers(x.data_ptr(), row, rows, addend, out.data_ptr())) + rest)
        return out

    return run, (x, sample_scale, sample_zero, other)


def empty_image(axes: int) -> Callable[[Any, torch.dtype], Tensor]:
    """What makes an uninitialised [B, C, *spatial] tensor that lies channels last."""
    if axes == 2:
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    if axes == 3:
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, memory_format=torch.channels_last_3d)
    return lambda shape, dtype: torch.empty((shape[0], shape[2], shape[1]), dtype=dtype).movedim(-1, 1)


class PoolBlock:
    """The argument block of one qpass.packed_max_pool but for what a call brings."""

    def __init__(self, node: fx.Node) -> None:
        _, size, stride, padding, dilation, ceil_mode = node.args
        stride = stride or size
        self.axes = len(size)
        self._walk = (*three(size, 1), *three(stride, 1), *three(padding, 0), *three(dilation, 1))
        self._shape_of = pooled_shape(size, stride, padding, dilation, ceil_mode)

    def shape(self, given) -> tuple[int, ...]:
        """Of the result, from that of x."""
        return (*given[:2], *self._shape_of(list(given[2:])))

    def pack(self, given, threads: int, x: int = 0, out: int = 0) -> bytes:
        """given: the shape of x. x, out: addresses."""
        missing = (1,) * (3 - self.axes)
        numbers = (*given[:2], *missing, *given[2:], *missing, *self.shape(given)[2:], *self._walk)
        return POOL.pack(x, out, *numbers, threads)


def max_pool_call(node: fx.Node) -> Call:
    """A call of qpass.packed_max_pool."""
    block, launch = PoolBlock(node), kernel("qpass_pool")
    empty = empty_image(block.axes)

    def run(x: Tensor) -> Tensor:
        image = x.movedim(1, -1).contiguous()
        out = empty(block.shape(x.shape), torch.uint8)
        launch(block.pack(x.shape, torch.get_num_threads(), image.data_ptr(), out.data_ptr()))
        return out

    return run, (node.args[0],)


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
