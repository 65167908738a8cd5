"""Exact clean-ups around convolutions: other spellings of what later passes know by one name.

1. hardtanh(x, 0, 6)                                               ->   relu6(x)
2. adaptive_avg_pool(x, 1)                                         ->   mean(x, spatial axes, keepdim)      what torch runs
3. view(transpose(view(x, [B, g, C / g, ...]), 1, 2), [B, C, ...]) ->   channel_shuffle(x, g)
4. pad(x, [0, ..])                                                 ->   x
5. convolution(pad(x, [p, p, ..], 0), padding=q)                   ->   convolution(x, padding=p + q)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.graphs import PADS, add_call, single_user

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default)
COPIES = (aten.contiguous.default, aten.clone.default)
ADAPTIVE = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)


def simplify_images(gm: fx.GraphModule) -> int:
    """Applies 1 to 5; returns the number of nodes changed."""
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
        elif node.target in PADS and not any(node.args[1]):
            made = node.args[0]
        elif node.target is aten.convolution.default:
            edits += _take_padding(node)
        if made is not None:
            node.replace_all_uses_with(made)
            edits += 1
    if edits:
        gm.graph.eliminate_dead_code()
    return edits


def _take_padding(node: fx.Node) -> int:
    """5, for zeros that are as many on both sides of an axis, in front of a convolution that is not transposed."""
    pad: Any = node.args[0]
    if pad.target not in PADS or node.args[6]:
        return 0
    widths, padding = list(pad.args[1]), node.args[4]
    constant_mode = pad.target is aten.constant_pad_nd.default or len(pad.args) < 3 or pad.args[2] == "constant"
    value = pad.args[-1] if len(pad.args) > (2 if pad.target is aten.constant_pad_nd.default else 3) else 0
    before, after = widths[-2::-2], widths[::-2]  # of the outer axes first
    known = all(isinstance(width, int) and width >= 0 for width in widths)
    if not constant_mode or value or not known or before != after or len(before) > len(padding):
        return 0
    more = [0] * (len(padding) - len(before)) + before
    node.update_arg(0, pad.args[0])
    node.update_arg(4, [p + q for p, q in zip(padding, more, strict=True)])
    return 1


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
