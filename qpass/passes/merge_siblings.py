"""One matmul instead of several that read the same integers (q, k, v; gate, up).

    a = qpass.linear(x, w1, s1, b1)              y = qpass.linear(x, cat(w1, w2), cat(s1, s2), cat(b1, b2))
    b = qpass.linear(x, w2, s2, b2)      ->      a, b = y[..., :N1], y[..., N1:]

1. same input, scale and types, weights with scales of their own for each output (channels or groups of its row), float
   results without residual, activation or requantize;
2. weights, scales, zero points and biases are constants;
3. an activation in one of them (gate, up) is left behind its part, where the backend would rather have one launch;
4. the parts are views of one result, with gaps between their rows: what reads them is told so, for generated kernels go by
   that, and a view that cannot be one of a part (`view(b, s * heads, d)` of older attention) reads a copy.
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.backends.onednn import ACTIVATION_CALLS
from qpass.graphs import add_call, add_constant, constant
from qpass.passes.strides import follow_all

aten = torch.ops.aten
Q = torch.ops.qpass


def merge_siblings(gm: fx.GraphModule, context) -> int:
    """Merges each family of sibling linears; returns the number of linears that went away."""
    families: dict[tuple, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.target is Q.linear.default and _mergeable(node, context.backend.merges_activations):
            key = (node.args[:4], node.args[6], node.args[10:14])
            families.setdefault(key, []).append(node)
    merged = [family for family in families.values() if len(family) > 1]
    moved: set[fx.Node] = set()
    for family in merged:
        _merge(gm, family, moved)
    follow_all(gm, moved)
    gm.graph.eliminate_dead_code()
    return sum(len(family) - 1 for family in merged)


def _mergeable(node: fx.Node, activated: bool) -> bool:
    data, scale, weight_type, bias, other, act, out_type = (node.args[i] for i in (4, 5, 6, 7, 8, 9, 12))
    constants = [data, scale, *(value for value in (bias, node.args[14]) if value is not None)]
    return (
        not weight_type.endswith("/t")
        and other is None
        and (not act or activated)
        and not out_type
        and all(constant(c) is not None for c in constants)
    )


def _merge(gm: fx.GraphModule, family: list[fx.Node], moved: set[fx.Node]) -> None:
    first = family[0]
    data, scale, bias = (_joined(gm, family, i) for i in (4, 5, 7))
    zero = _joined(gm, family, 14)
    args = (*first.args[:4], data, scale, first.args[6], bias, first.args[8], "", *first.args[10:14], zero)
    y = add_call(gm, Q.linear.default, args, first)
    y.meta["site"] = "+".join(node.meta.get("site", node.name) for node in family)
    y.meta["rule"] = "merge_siblings"
    start = 0
    for node in family:
        width = constant(node.args[4]).shape[0]
        part = add_call(gm, aten.slice.Tensor, (y, -1, start, start + width), first)
        part.meta["site"] = node.meta.get("site", node.name)
        if node.args[9]:
            target, options = ACTIVATION_CALLS[node.args[9]]
            part = add_call(gm, target, (part,), first, **options)
        node.replace_all_uses_with(part)
        moved.add(part)
        start += width
    for node in family:
        gm.graph.erase_node(node)


def _joined(gm: fx.GraphModule, family: list[fx.Node], index: int) -> fx.Node | None:
    nodes = [node.args[index] for node in family]
    if all(node is None for node in nodes):
        return None
    rows = [constant(node.args[4]).shape[0] for node in family]
    device = constant(family[0].args[4]).device
    parts = [torch.zeros(n, device=device) if i is None else constant(i) for n, i in zip(rows, nodes, strict=True)]
    name = f"{family[0].meta.get('site', 'linear')}_merged"
    return add_constant(gm, name, torch.cat([part.detach() for part in parts]), family[0])
