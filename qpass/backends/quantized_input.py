"""What stands between a quantize and the value it reads: the shift and factor that a plan moves onto an input.

`affine` is x * mul, x - shift, in this order, each or neither, with one constant a column. A kernel that makes the value can
apply it and quantize, in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qpass.graphs import constant

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """source * mul - shift, column by column; None is 1 and 0. readers: the nodes on the way that read the source."""

    source: fx.Node
    readers: tuple[fx.Node, ...]
    mul: Tensor | None
    shift: Tensor | None


def affine_of(node: fx.Node) -> Affine | None:
    """What a quantize reads, without the constants it is scaled and shifted by."""
    dynamic = node.args[3] != "u8/t"
    if not dynamic and (constant(node.args[1]) is None or constant(node.args[2]) is None):
        return None
    value, mul, shift = node.args[0], None, None
    readers = (node, *node.args[1].all_input_nodes) if dynamic else (node,)  # choose_qparams reads a dynamic one too
    if value.target is aten.sub.Tensor and column(value.args[1]) is not None and value.kwargs.get("alpha", 1) == 1:
        if set(value.users) != set(readers):
            return None
        shift, value, readers = column(value.args[1]), value.args[0], (value,)
    if value.target is aten.mul.Tensor and column(value.args[1]) is not None:
        if set(value.users) != set(readers):
            return None
        mul, value, readers = column(value.args[1]), value.args[0], (value,)
    return Affine(value, readers, mul, shift) if value.op == "call_function" else None


def column(node: object) -> Tensor | None:
    """The constant of one number a column behind a node, float32 [K], or None."""
    value = constant(node)
    return value.detach().float() if value is not None and value.dim() == 1 else None
