"""Exact clean-ups around convolutions: other spellings of what later passes know by one name.

1. hardtanh(x, 0, 6)                                               ->   relu6(x)
2. adaptive_avg_pool(x, 1)                                         ->   mean(x, spatial axes, keepdim)      what torch runs
3. view(transpose(view(x, [B, g, C / g, ...]), 1, 2), [B, C, ...]) ->   channel_shuffle(x, g)
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.graphs import add_call, single_user

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default)
COPIES = (aten.contiguous.default, aten.clone.default)
ADAPTIVE = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)


def simplify_images(gm: fx.GraphModule) -> int:
    """Applies 1 to 3; returns the number of nodes changed."""
    edits = 0
    for node in list(gm.graph.nodes):
        made = None
        if node.target is aten.hardtanh.default and tuple(map(float, node.args[1:3])) == (0.0, 6.0):
            made = add_call(gm, aten.relu6.default, (node.args[0],), node)
        elif node.target in ADAPTIVE and all(size == 1 for size in node.args[1]):
            axes = list(range(-len(node.args[1]), 0))
            made = add_call(gm, aten.mean.dim, (node.args[0], axes, True), node)
        elif node.target in RESHAPES:
            made = _shuffle(gm, node)
        if made is not None:
            node.replace_all_uses_with(made)
            edits += 1
    if edits:
        gm.graph.eliminate_dead_code()
    return edits


def _shuffle(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    turned = node.args[0]
    while turned.target in COPIES and single_user(turned) is not None:
        turned = turned.args[0]
    if turned.target is not aten.transpose.int or sorted(turned.args[1:3]) != [1, 2] or single_user(turned) is None:
        return None
    split = turned.args[0]
    if split.target not in RESHAPES or single_user(split) is None:
        return None
    x, parts, whole = split.args[0].meta["val"], split.meta["val"], node.meta["val"]
    if parts.dim() != x.dim() + 1 or x.dim() < 3 or str(x.shape) != str(whole.shape):
        return None
    groups = parts.shape[1]
    if not isinstance(groups, int) or str(parts.shape[3:]) != str(x.shape[2:]) or groups * parts.shape[2] != x.shape[1]:
        return None
    return add_call(gm, aten.channel_shuffle.default, (split.args[0], groups), node)
