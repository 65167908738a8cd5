"""The arguments of a convolution, checked, and in plain torch: its window and its packed weights (conv_finish.py: the rest).

    pack            [N, C, KH, KW] -> [N, KH * KW * depth(C)], K in the order (kh, kw, c): a pixel's channels lie together
    pack_depthwise  [C, 1, KH, KW] -> [KH * KW, C]
    correction      zero * (sum of the weights over the taps inside the image) -> int32 [states(KH) * states(KW), N]; of
                    zero 1 where each image has a zero point of its own

Kernels read 0 where the window hangs over the image, as loads that bypass registers can, though the code of a real 0 is the
zero point. The error is the same for all pixels with the same taps inside, and these are a range [low, high) of rows and one
of columns, whatever the size of the image. A range has a state: 0 where it is empty, else its place in `ranges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qpass_kernels.conv_finish import Finish, channels_last

WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation"
ARGUMENTS = (
    f"{WINDOW}, Tensor alpha, Tensor? beta, Tensor? other, float other_scale, int other_zero, str act, Tensor? slope, "
    "float out_scale, int out_zero, ScalarType out_dtype, Tensor? sample_scale, Tensor? sample_zero, int groups"
)
GRAIN = 4  # the fewest bytes that an asynchronous copy to shared memory moves


@dataclass(frozen=True)
class Window:
    """What slides over an image: two numbers each, of rows and of columns. padding: two, or (top, left, bottom, right)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def check(self, op: str) -> None:
        """Raises ValueError unless this is a window in two dimensions."""
        for name, least, sizes in (
            ("kernel", 1, (2,)),
            ("stride", 1, (2,)),
            ("padding", 0, (2, 4)),
            ("dilation", 1, (2,)),
        ):
            value = getattr(self, name)
            if len(value) not in sizes or min(value) < least:
                raise ValueError(
                    f"{op}: {name} must be {' or '.join(map(str, sizes))} numbers from {least} on, not {list(value)}"
                )

    def sizes(self, h: int, w: int, ceil: bool = False) -> tuple[int, int]:
        """Rows and columns of the result on an image [h, w]; sizes may be symbols. ceil: the last window may hang over."""
        found = []
        for i, size in enumerate((h, w)):
            stride, front = self.stride[i], self.padding[i]
            free = size + front + self.padding[i - 2] - self.dilation[i] * (self.kernel[i] - 1) - 1
            count = (free + (stride - 1 if ceil else 0)) // stride + 1
            found.append(count - 1 if ceil and (count - 1) * stride >= size + front else count)
        return found[0], found[1]

    def slide(self, x: Tensor, taps: Tensor) -> Tensor:
        """The plain convolution of x [B, C, H, W] with taps [N, C of a group, KH, KW], padded with 0."""
        top, left, bottom, right = (*self.padding, *self.padding)[:4]
        held = functional.pad(x, (left, right, top, bottom))
        return functional.conv2d(held, taps, None, self.stride, 0, self.dilation, x.shape[1] // taps.shape[1])

    def states(self, h: int, w: int, device: torch.device) -> Tensor:
        """The row of `correction` for each pixel of the result on an image [h, w]: [OH, OW]."""
        rows, columns = (
            self._states(i, size, count, device)
            for i, (size, count) in enumerate(zip((h, w), self.sizes(h, w), strict=True))
        )
        return rows[:, None] * states(self.kernel[1]) + columns[None, :]

    def _states(self, i: int, size: int, count: int, device: torch.device) -> Tensor:
        first = torch.arange(count, device=device) * self.stride[i] - self.padding[i]
        taps = first[:, None] + torch.arange(self.kernel[i], device=device) * self.dilation[i]
        inside = (taps >= 0) & (taps < size)
        low, many = inside.long().argmax(1), inside.sum(1)
        return torch.where(many > 0, low * self.kernel[i] - low * (low - 1) // 2 + many, 0)


def ranges(taps: int) -> list[tuple[int, int]]:
    """Every range [low, high) of taps in the order of their states: the empty one, then by low, then by high."""
    return [(0, 0), *((low, high) for low in range(taps) for high in range(low + 1, taps + 1))]


def states(taps: int) -> int:
    """How many ranges there are."""
    return taps * (taps + 1) // 2 + 1


def depth(channels: int) -> int:
    """Channels of a group as kernels read them: a multiple of GRAIN, which all but the channels of a photo mostly are."""
    return -(-channels // GRAIN) * GRAIN


def pack(weight: Tensor) -> Tensor:
    """[N, C, KH, KW] -> [N, KH * KW * depth(C)], C the channels of a group; int8 or float8_e4m3fn."""
    n, c, kh, kw = weight.shape
    packed = torch.zeros((n, kh, kw, depth(c)), dtype=weight.dtype, device=weight.device)
    packed[..., :c] = weight.permute(0, 2, 3, 1)
    return packed.reshape(n, -1)


def unpack(packed: Tensor, channels: int, kernel: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`."""
    return packed.reshape(packed.shape[0], *kernel, depth(channels))[..., :channels].permute(0, 3, 1, 2)


def pack_depthwise(weight: Tensor) -> Tensor:
    """[C, 1, KH, KW] -> [KH * KW, C]."""
    return weight.flatten(1).t().contiguous()


def unpack_depthwise(packed: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_depthwise`."""
    return packed.t().reshape(packed.shape[1], 1, *kernel)


def correction(weight: Tensor, zero: int) -> Tensor | None:
    """What a zero point adds to the sums of an int8 weight [N, C, KH, KW], by state; None where it is 0."""
    if zero == 0:
        return None
    n, _, kh, kw = weight.shape
    area = torch.zeros((n, kh + 1, kw + 1), dtype=torch.int64, device=weight.device)
    area[:, 1:, 1:] = weight.sum(1, dtype=torch.int64).cumsum(1).cumsum(2)
    top, bottom = torch.tensor(ranges(kh), device=weight.device).t()
    left, right = torch.tensor(ranges(kw), device=weight.device).t()
    strip = area[:, bottom] - area[:, top]
    return (zero * (strip[..., right] - strip[..., left])).flatten(1).t().to(torch.int32).contiguous()


def padded(x: Tensor, groups: int) -> Tensor:
    """[B, C, H, W] -> contiguous [B, H, W, groups * depth(C / groups)]; no copy where C / groups is a multiple of GRAIN."""
    rows = channels_last(x)
    c = x.shape[1] // groups
    if c == depth(c):
        return rows
    held = rows.new_zeros((*rows.shape[:3], groups, depth(c)))
    held[..., :c] = rows.unflatten(3, (groups, c))
    return held.flatten(3)


def empty_image(x: Tensor, channels: int, window: Window, dtype: torch.dtype, ceil: bool = False) -> Tensor:
    """The result of a window on x [B, C, H, W], without values: [B, channels, OH, OW], stored channels last."""
    rows, columns = window.sizes(x.shape[2], x.shape[3], ceil)
    return x.new_empty((x.shape[0], rows, columns, channels), dtype=dtype).permute(0, 3, 1, 2)


def arguments(values: Sequence[Any]) -> tuple[Window, Finish, int]:
    """(window, epilogue, groups) of the values of ARGUMENTS."""
    return Window(*map(tuple, values[:4])), Finish(*values[4:-1]), values[-1]


def check_image(op: str, x: Tensor, weight: Tensor, window: Window) -> None:
    """Raises ValueError unless x is an image of 8 bits that the window fits on, and weight is like it."""
    window.check(op)
    if x.dim() != 4 or x.dtype not in (torch.int8, torch.float8_e4m3fn) or weight.dtype != x.dtype:
        raise ValueError(
            f"{op}: x must be [B, C, H, W], and x and weight both int8 or float8_e4m3fn, not {tuple(x.shape)}, {x.dtype} "
            f"and {weight.dtype}"
        )
    if weight.dim() != 2 or not weight.is_contiguous() or weight.device != x.device:
        raise ValueError(
            f"{op}: weight must be contiguous and packed in two dimensions, on {x.device}, not {weight.shape}"
        )
    if min(window.sizes(x.shape[2], x.shape[3])) < 1:
        raise ValueError(f"{op}: the window {window} does not fit on an image of {x.shape[2]} x {x.shape[3]}")


def exact_sums(
    x: Tensor, weight: Tensor, correction: Tensor | None, window: Window, groups: int, sample_zero: Tensor | None = None
) -> Tensor:
    """The sums of the centred codes, [B, N, OH, OW], float64: exact for int8."""
    taps = unpack(weight, x.shape[1] // groups, window.kernel).double()
    acc = window.slide(x.double(), taps)
    if correction is None:
        return acc
    zero = 1.0 if sample_zero is None else sample_zero.double().reshape(-1, 1, 1, 1)
    return acc - correction[window.states(x.shape[2], x.shape[3], x.device)].permute(2, 0, 1).double() * zero
