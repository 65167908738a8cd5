"""Codes as the kernels hold them: int8, 128 less than those of the graph's uint8, since tensor cores multiply signed bytes.

    to_unsigned(q int8)   uint8, q + 128        to_signed(q uint8)   int8, q - 128

A lowering puts to_signed in front of its kernel and to_unsigned behind it, so that every graph on the way is right; where the
two meet they cancel, and so they do through whatever only moves codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.graphs import add_call, constant
from qpass.ops import define

aten = torch.ops.aten
Q = torch.ops.qpass

HALF = 128
MOVES = (
    *(aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.flatten.using_ints),
    *(aten.clone.default, aten.contiguous.default, aten.unflatten.int),
)


def to_signed(q: Tensor) -> Tensor:
    """Uint8 codes as int8, 128 less; laid out as they were."""
    return q.bitwise_xor(HALF).view(torch.int8)


def to_unsigned(q: Tensor) -> Tensor:
    """Int8 codes as uint8, 128 more; laid out as they were."""
    return q.view(torch.uint8).bitwise_xor(HALF)


define("to_signed(Tensor q) -> Tensor", to_signed, lambda q: torch.empty_like(q, dtype=torch.int8), True)
define("to_unsigned(Tensor q) -> Tensor", to_unsigned, lambda q: torch.empty_like(q, dtype=torch.uint8), True)
INVERSE = {Q.to_signed.default: Q.to_unsigned.default, Q.to_unsigned.default: Q.to_signed.default}


def signed(gm: fx.GraphModule, codes: fx.Node, before: fx.Node) -> fx.Node:
    """The int8 node of a uint8 one."""
    return add_call(gm, Q.to_signed.default, (codes,), before)


def unsigned(gm: fx.GraphModule, codes: fx.Node, before: fx.Node) -> fx.Node:
    """The uint8 node of an int8 one."""
    return add_call(gm, Q.to_unsigned.default, (codes,), before)


def signed_zero(gm: fx.GraphModule, zero: fx.Node, before: fx.Node) -> fx.Node:
    """The zero points of int8 codes from those of uint8 codes."""
    return add_call(gm, aten.sub.Scalar, (zero, HALF), before)


def static_zero(zero: fx.Node) -> int:
    """The zero point of int8 codes behind a constant of uint8 codes."""
    return int(constant(zero)) - HALF


def cancel(gm: fx.GraphModule) -> int:
    """Removes pairs that undo each other; returns their number."""
    edits = 0
    for node in list(gm.graph.nodes):
        source = _undone(gm, node) if node.target in INVERSE else _same_zero(node)
        if source is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            edits += 1
    gm.graph.eliminate_dead_code()
    return edits


def _same_zero(node: fx.Node) -> fx.Node | None:
    """Zero points that were made those of uint8 codes and are made those of int8 codes again."""
    if node.target is not aten.sub.Scalar or node.args[1] != HALF:
        return None
    zero = node.args[0]
    return zero.args[0] if zero.target is aten.add.Scalar and zero.args[1] == HALF else None


def _undone(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The codes before the inverse of `node`, moved as they are moved on the way to it."""
    path, value = [], node.args[0]
    while value.target in MOVES:
        path.append(value)
        value = value.args[0]
    if value.target is not INVERSE[node.target]:
        return None
    source = value.args[0]
    for step in reversed(path):
        source = add_call(gm, step.target, (source, *step.args[1:]), node, **step.kwargs)
    return source
