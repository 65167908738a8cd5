"""How the convolution kernels want their weights, and back.

    panels      int8 [groups, panels, taps, C / 4, width, 4]     width = min(64, a group's outputs rounded up to 16)
    folded      the same, the taps along the last axis and the channels being one run of kernel * C bytes
    depthwise   int8 [C / 64, taps / 4, 4, 16, 4]                lane 4 q + e of vector j: channel 16 q + 4 j + e

Everything is zero padded. A group is a set of output channels that read the same inputs. Groups of few outputs are merged to
one whose weights are zero where an output and an input were of different groups: sixteen outputs cost as much as one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PANEL, LANES = 64, 16
FEW = 16  # channels below which a row of taps is folded


def layout(inputs: int, outputs: int, kernel: list[int], groups: int, transposed: bool) -> str:
    """The layout of the weights of a convolution with so many inputs and outputs a group."""
    if inputs == outputs == 1:
        return "depthwise"
    return "folded" if inputs < FEW and groups == 1 and kernel[-1] > 1 and not transposed else "panels"


def by_columns(kernel: list[int]) -> bool:
    """Whether the taps of a depthwise convolution lie column by column, three and a zero, instead of row by row."""
    return math.prod(kernel[:-1]) == 3 and kernel[-1] == 3


def grouped(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """[groups, outputs, inputs, *kernel] from torch's [N, C / groups, *kernel], transposed [C, N / groups, *kernel]."""
    split = weight.unflatten(0, (groups, -1))
    return split.transpose(1, 2) if transposed else split


def pack_conv(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """int8 [N, C / groups, *kernel], transposed [C, N / groups, *kernel], as the kernels want it."""
    split = grouped(weight, groups, transposed)
    _, outputs, inputs, *kernel = split.shape
    if layout(inputs, outputs, kernel, groups, transposed) == "depthwise":
        taps = split.reshape(groups, -1)
        if by_columns(kernel):
            taps = _padded(taps.view(groups, 3, 3).transpose(1, 2), (1, 1, 4)).flatten(1)
        taps = _padded(taps, (PANEL, 4))
        return taps.view(-1, 4, 4, 4, taps.shape[1] // 4, 4).permute(0, 4, 2, 1, 3, 5).flatten(3, 4).contiguous()
    runs = split.movedim(2, -1)
    if layout(inputs, outputs, kernel, groups, transposed) == "folded":
        runs = runs.reshape(groups, outputs, -1, kernel[-1] * inputs)
    else:
        runs = _merged(runs.reshape(groups, outputs, -1, inputs), merged(outputs, groups))
    width = panel_width(runs.shape[1])
    runs = _padded(runs, (1, width, 1, 4))
    return (
        runs.view(runs.shape[0], -1, width, runs.shape[2], runs.shape[3] // 4, 4).permute(0, 1, 3, 4, 2, 5).contiguous()
    )


def merged(outputs: int, groups: int) -> int:
    """How many groups of so many outputs are computed as one."""
    return max(m for m in range(1, max(1, LANES // outputs) + 1) if groups % m == 0)


def _merged(runs: Tensor, count: int) -> Tensor:
    """[groups / count, count * outputs, taps, count * inputs] from [groups, outputs, taps, inputs]."""
    groups, outputs, taps, inputs = runs.shape
    wide = torch.zeros(groups // count, count, outputs, taps, count, inputs, dtype=runs.dtype)
    for i in range(count):
        wide[:, i, :, :, i] = runs[i::count]
    return wide.flatten(4, 5).flatten(1, 2)


def _unmerged(runs: Tensor, count: int) -> Tensor:
    """The inverse of _merged."""
    split = runs.unflatten(3, (count, -1)).unflatten(1, (count, -1))
    return torch.stack([split[:, i, :, :, i] for i in range(count)], 1).flatten(0, 1)


def panel_width(outputs: int) -> int:
    """Output channels of a panel, of a group with so many."""
    return min(PANEL, -(-outputs // LANES) * LANES)


def unpack_conv(packed: Tensor, channels: int, n: int, kernel: list[int], groups: int, transposed: bool) -> Tensor:
    """[groups, outputs, inputs, *kernel] (see `grouped`) from what pack_conv made."""
    inputs, outputs, taps = channels // groups, n // groups, math.prod(kernel)
    if packed.dim() == 5:
        flat = packed.unflatten(3, (4, 4)).permute(0, 3, 2, 4, 1, 5)
        flat = flat.reshape(-1, packed.shape[1] * 4)[:groups]
        if by_columns(kernel):
            flat = flat.view(groups, 3, 4)[:, :, :3].transpose(1, 2).flatten(1)
        return flat[:, :taps].reshape(groups, 1, 1, *kernel)
    flat = packed.permute(0, 1, 4, 2, 3, 5).flatten(4, 5).flatten(1, 2)
    count = groups // packed.shape[0]
    run = taps * inputs // packed.shape[2]
    runs = _unmerged(flat[:, : count * outputs, :, : count * run], count)
    return runs.reshape(groups, outputs, *kernel, inputs).movedim(-1, 2)


def ungrouped(split: Tensor, transposed: bool) -> Tensor:
    """The inverse of `grouped`."""
    return (split.transpose(1, 2) if transposed else split).flatten(0, 1)


def _padded(x: Tensor, multiples: tuple[int, ...]) -> Tensor:
    """Zeros behind each axis up to a multiple."""
    whole = [-(-size // m) * m for size, m in zip(x.shape, multiples, strict=True)]
    out = torch.zeros(whole, dtype=x.dtype)
    out[tuple(slice(size) for size in x.shape)] = x
    return out
