"""Where the heads of an attention lie: the views between a projection and attention cost a Python call each, so they are
read through instead.

    transpose(view(slice(y, -1, start, end), [batch, length, heads, width]), 1, 2)   ->   y, start, heads, width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Located = tuple[int, tuple[int, ...], tuple[int, ...], Tensor]  # address, sizes, strides of three axes, what holds it


@dataclass(frozen=True)
class Heads:
    """node: what to read. locate: its value -> (address, [batch, heads, length, width], strides, the tensor to keep)."""

    node: fx.Node
    locate: Callable[[Tensor], Located]


def heads_of(node: fx.Node) -> Heads:
    """The furthest value behind views in which the heads of a [batch, heads, length, width] node lie."""
    found = _projection(node)
    if found is None:
        return Heads(node, _as_it_is)
    source, start, heads, width = found

    def locate(y: Tensor) -> Located:
        if not y.is_contiguous():
            y = y.contiguous()
        batch, length, row = y.shape
        return y.data_ptr() + start * y.element_size(), (batch, heads, length, width), (length * row, width, row), y

    return Heads(source, locate)


def _as_it_is(x: Tensor) -> Located:
    if x.stride(3) != 1:
        x = x.contiguous()
    return x.data_ptr(), tuple(x.shape), x.stride()[:3], x


def _projection(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    if node.target is not aten.transpose.int or {a % 4 for a in node.args[1:3]} != {1, 2}:
        return None
    split: Any = node.args[0]
    if split.target not in (aten.view.default, aten.reshape.default):
        return None
    shape, source = split.meta["val"].shape, split.args[0]
    before = source.meta["val"].shape
    if len(shape) != 4 or len(before) != 3 or str(shape[:2]) != str(before[:2]):
        return None
    start = 0
    if source.target is aten.slice.Tensor and source.args[1] in (-1, 2) and source.args[4] == 1:
        whole, start = source.args[0], source.args[2]
        source, start = (whole, start) if isinstance(start, int) and start >= 0 else (source, 0)
    heads, width = shape[2], shape[3]
    return (source, start, heads, width) if isinstance(heads, int) and isinstance(width, int) else None
