"""How the convolution kernel holds a weight, and what it subtracts for the zero point (src/conv.cpp).

usual       [group, N / 64, tap, C / 4, 64, 4]
folded      the same with the kernel's width and the channels as one axis: few channels fill groups of four so
depthwise   [C / 64, tap / 4, 4, 4, 4, 4 taps]: channel 16 a + 4 b + c lies at [.., b, a, c];
            taps of 3 x 3 go column by column, each of three and a 0
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from qpass.convolutions import Geometry

FEW = 16  # channels below which the kernel's width is folded into them


def is_depthwise(channels: int, n: int, g: Geometry) -> bool:
    """One input channel and one output channel a group."""
    return g.groups > 1 and g.groups == channels == n and not g.transposed


def by_columns(g: Geometry) -> bool:
    """Whether the taps of a depthwise convolution are packed column by column."""
    return math.prod(g.kernel[:-1]) == 3 and g.kernel[-1] == 3


def is_folded(channels: int, g: Geometry) -> bool:
    """Whether the kernel's width and the channels are read as one run."""
    return channels < FEW and g.kernel[-1] > 1 and g.dilation[-1] == 1 and g.groups == 1 and not g.transposed


def plain_weight(weight: Tensor, g: Geometry) -> Tensor:
    """[N, C / groups, *kernel] of a weight as torch holds it."""
    if not g.transposed:
        return weight
    by_group = weight.reshape(g.groups, -1, *weight.shape[1:])  # [groups, C / groups, N / groups, *kernel]
    return by_group.transpose(1, 2).flatten(0, 1)


def pack_conv(weight: Tensor, g: Geometry) -> Tensor:
    """int8, as torch holds it -> int8, as the kernel does."""
    weight = plain_weight(weight, g)
    n, per_group = weight.shape[:2]
    channels = per_group * g.groups
    rows = weight.flatten(2).transpose(1, 2)  # [N, taps, C / groups]
    if is_depthwise(channels, n, g):
        rows = rows.squeeze(2)
        if by_columns(g):
            rows = functional.pad(rows.reshape(n, 3, 3).transpose(1, 2), (0, 1)).flatten(1)
        padded = functional.pad(rows, (0, -rows.shape[1] % 4, 0, -n % 64))
        return padded.reshape(-1, 4, 4, 4, padded.shape[1] // 4, 4).permute(0, 4, 2, 1, 3, 5).contiguous()
    if is_folded(channels, g):
        rows = rows.reshape(n, -1, g.kernel[-1] * per_group)
    taps, width = rows.shape[1:]
    padded = functional.pad(
        rows.reshape(g.groups, n // g.groups, taps, width), (0, -width % 4, 0, 0, 0, -(n // g.groups) % 64)
    )
    split = padded.reshape(g.groups, -1, 64, taps, padded.shape[3] // 4, 4)
    return split.permute(0, 1, 3, 4, 2, 5).contiguous()


def unpack_conv(packed: Tensor, channels: int, n: int, g: Geometry) -> Tensor:
    """int8 [N, C / groups, *kernel] of a packed weight."""
    per_group = channels // g.groups
    if is_depthwise(channels, n, g):
        rows = packed.permute(0, 3, 2, 4, 1, 5).flatten(0, 3).flatten(1)
        if by_columns(g):
            rows = rows.reshape(-1, 3, 4)[..., :3].transpose(1, 2).flatten(1)
        return rows[:n, : math.prod(g.kernel)].reshape(n, 1, *g.kernel)
    rows = packed.permute(0, 1, 4, 2, 3, 5).flatten(4).flatten(1, 2)  # [groups, N / groups padded, taps, width padded]
    width = per_group * (g.kernel[-1] if is_folded(channels, g) else 1)
    rows = rows[:, : n // g.groups, :, :width].reshape(n, math.prod(g.kernel), per_group)
    return rows.transpose(1, 2).reshape(n, per_group, *g.kernel)


def phases(g: Geometry) -> list[tuple[int, ...]]:
    """The first output position of each phase of a transposed convolution; one for others."""
    steps = g.stride if g.transposed else (1,) * g.axes
    return list(itertools.product(*(range(step) for step in steps)))


def phase_offsets(weight: Tensor, g: Geometry) -> Tensor:
    """int32 [phases, N]: the sum of the integers that an output of each phase is multiplied by. weight: [N, C /
    groups, *kernel].
    """
    found = []
    for first in phases(g):
        seen = torch.ones(g.kernel, dtype=torch.bool)
        for axis in range(g.axes if g.transposed else 0):
            at = first[axis] + g.padding[axis] - torch.arange(g.kernel[axis]) * g.dilation[axis]
            seen = seen & (at % g.stride[axis] == 0).reshape([-1 if i == axis else 1 for i in range(g.axes)])
        found.append((weight.to(torch.int32) * seen).flatten(1).sum(1, dtype=torch.int32))
    return torch.stack(found)
