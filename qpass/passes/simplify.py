"""Exact clean-ups of a float graph that make later patterns meet.

    view(linear(view(x, [-1, K]), w, b), [..., N])   ->   linear(x, w, b)

and those around convolutions (simplify_images.py).
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.graphs import add_call, single_user
from qpass.passes.simplify_images import simplify_images

aten = torch.ops.aten
FLATTENS = (aten.view.default, aten.reshape.default)


def simplify(gm: fx.GraphModule, context: object = None) -> int:
    """Returns the number of nodes changed."""
    edits = simplify_images(gm)
    for node in list(gm.graph.nodes):
        if node.target is aten.linear.default:
            edits += _unflatten(gm, node)
    gm.graph.eliminate_dead_code()
    return edits


def _unflatten(gm: fx.GraphModule, node: fx.Node) -> int:
    flat, back = node.args[0], single_user(node)
    if flat.op != "call_function" or flat.target not in FLATTENS or back is None or back.target not in FLATTENS:
        return 0
    x = flat.args[0]
    before, after = x.meta["val"], back.meta["val"]
    if before.dim() != after.dim() or str(before.shape[:-1]) != str(after.shape[:-1]) or before.dim() < 2:
        return 0
    if str(before.shape[-1]) != str(flat.meta["val"].shape[-1]) or str(after.shape[-1]) != str(
        node.meta["val"].shape[-1]
    ):
        return 0
    wide = add_call(gm, aten.linear.default, (x, *node.args[1:]), node)
    back.replace_all_uses_with(wide)
    gm.graph.erase_node(back)
    gm.graph.erase_node(node)
    return 1
