"""The rows a convolution multiplies: patches of its input, at sampled output positions.

    convolution:             row r = x_padded[b, :, o * stride + k * dilation]    [C * taps], channels outermost
    transposed convolution:  row r = x[b, :, i]                                   [C]

so that the product is  rows @ weight.reshape(N, -1).T  as for a linear, and its solvers serve. Positions are spread over the
batch, one at a random place of each of `most` equal stretches of it, and depend on nothing but its shape. (At even distances
they would fall on few columns of an image: on one alone where the distance is a multiple of its width.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from qpass.geometry import Geometry

MOST = 1024  # rows taken of one batch


def patches(x: Tensor, g: Geometry, most: int = MOST) -> Tensor:
    """x: [B, C, *spatial]. Returns [rows, C * taps] ([rows, C] where transposed), float32."""
    x = x.detach().float()
    if g.transposed:
        sizes = list(x.shape[2:])
    else:
        x = functional.pad(x, [p for amount in reversed(g.padding) for p in (amount, amount)])
        walk = zip(x.shape[2:], g.kernel, g.stride, g.dilation, strict=True)
        sizes = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in walk]
    batch, *where = _positions([x.shape[0], *sizes], most)
    if g.transposed:
        return x.movedim(1, -1)[(batch, *where)]
    index: list[Tensor] = [batch.reshape(-1, *[1] * g.axes)]
    for axis in range(g.axes):
        taps = torch.arange(g.kernel[axis]) * g.dilation[axis]
        shape = [-1 if i == axis else 1 for i in range(g.axes)]
        start = (where[axis] * g.stride[axis]).reshape(-1, *[1] * g.axes)
        index.append(start + taps.reshape(1, *shape))
    found = x.movedim(1, -1)[tuple(index)]  # [rows, *kernel, C]
    return found.movedim(-1, 1).flatten(1)


def pixels(x: Tensor, most: int = MOST) -> Tensor:
    """Evenly spread pixels of an image x [B, C, *spatial]: [rows, C], float32."""
    x = x.detach().float().movedim(1, -1)
    return x[tuple(_positions(list(x.shape[:-1]), most))]


def _positions(sizes: list[int], most: int) -> list[Tensor]:
    """Indices of positions of a grid, in order, one tensor for each axis: all of them, or one of each stretch."""
    total = math.prod(sizes)
    count = min(total, most)
    within = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) if count < total else 0
    flat = ((torch.arange(count, dtype=torch.float64) + within) * (total / max(count, 1))).long().clamp(max=total - 1)
    found = []
    for size in reversed(sizes):
        found.append(flat % size)
        flat = flat // size
    return found[::-1]


def as_matrix(weight: Tensor, g: Geometry) -> Tensor:
    """The weight as rows that multiply patches: [N, C / groups * taps]; transposed, of one group: [N * taps, C]."""
    if not g.transposed:
        return weight.reshape(weight.shape[0], -1)
    return weight.flatten(1).t()
