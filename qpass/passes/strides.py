"""Values behind one that lies in memory otherwise than before: told anew, since generated kernels read by what they are told.

    y = slice(x, -1, 0, 64);  v = unflatten(y)      meta["val"] of v has the strides of a part of x

A node that cannot be computed from the new value, such as a view of what has gaps now, reads a copy of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.graphs import add_call, set_value

aten = torch.ops.aten


def follow_all(gm: fx.GraphModule, moved: set[fx.Node]) -> None:
    """Writes down the values of all nodes behind those of `moved`, whose strides are not what they were."""
    if not moved:
        return
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and any(i in moved for i in node.all_input_nodes) and not is_opaque(node):
            follow(gm, node, moved)


def follow(gm: fx.GraphModule, node: fx.Node, moved: set[fx.Node]) -> None:
    """Computes the value of a node whose inputs lie in another order now; where its strides changed, it has moved too."""
    before = strides(node)
    try:
        set_value(gm, node)
    except Exception:  # a view that is none any more, or an operator that takes no symbolic sizes outside of a trace
        for source in [i for i in node.all_input_nodes if i in moved]:
            copied = add_call(gm, aten.clone.default, (source,), node, memory_format=torch.contiguous_format)
            node.replace_input_with(source, copied)
        return
    if strides(node) != before:
        moved.add(node)


def strides(node: fx.Node) -> str:
    """The strides of a node's value, or of its values, as text."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return str([tuple(v.stride()) for v in values if isinstance(v, Tensor)])


def is_opaque(node: fx.Node) -> bool:
    """Whether a call cannot be run on fake values: an op on opaque packed tensors, whose value its lowering wrote down."""
    held = (i.meta.get("val") for i in node.all_input_nodes)
    return any(isinstance(value, Tensor) and value.device.type == "meta" for value in held)
