"""How the convolution kernels want their weights, and back.

    panels      int8 [groups, panels, taps, C / 4, width, 4]     width = min(64, a group's outputs rounded up to 16)
    folded      the same, the taps along the last axis and the channels being one run of kernel * C bytes
    depthwise   int8 [C / 64, taps / 4, 4, 16, 4]                lane 4 q + e of vector j: channel 16 q + 4 j + e

Everything is zero padded. A group is a set of output channels that read the same inputs.
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
    if layout(inputs, outputs, kernel, groups, transposed) == "folded":
        runs = split.movedim(2, -1).reshape(groups, outputs, -1, kernel[-1] * inputs)
    else:
        runs = split.movedim(2, -1).reshape(groups, outputs, -1, inputs)
    width = panel_width(outputs)
    runs = _padded(runs, (1, width, 1, 4))
    return runs.view(groups, -1, width, runs.shape[2], runs.shape[3] // 4, 4).permute(0, 1, 3, 4, 2, 5).contiguous()


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
    run = taps * inputs // packed.shape[2]
    return flat[:, :outputs, :, :run].reshape(groups, outputs, *kernel, inputs).movedim(-1, 2)


def ungrouped(split: Tensor, transposed: bool) -> Tensor:
    """The inverse of `grouped`."""
    return (split.transpose(1, 2) if transposed else split).flatten(0, 1)


def _padded(x: Tensor, multiples: tuple[int, ...]) -> Tensor:
    """Zeros behind each axis up to a multiple."""
    whole = [-(-size // m) * m for size, m in zip(x.shape, multiples, strict=True)]
    out = torch.zeros(whole, dtype=x.dtype)
    out[tuple(slice(size) for size in x.shape)] = x
    return out
