"""Move the per-channel factor of a packed convolution onto its input, and back to what makes the input, where that is free.

    1. convolution(x, dequantize(w, s) * m, b)   ->  convolution(x * m, dequantize(w, s), b)
    2. act(y) * m                                ->  act(y * m)                       relu, pools, ...: see scalable.py
    3. clamp(y, 0, h) * m                        ->  minimum(relu(y * m), h * m)      relu6 and its like
    4. batch_norm(y, g, b) * m                   ->  batch_norm(y, g * m, b * m)
    5. convolution(x, dequantize(w, s), b) * m   ->  convolution(x, dequantize(w, s * m), b * m)      also a float weight

Exact in real arithmetic (Nagel et al. 2019, 1906.04721, section 4.1), m > 0. 2 to 5 need all readers to take the same factor;
elsewhere the product stays where it got to.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.convolutions import is_convolution
from qpass.graphs import add_call, add_constant, constant
from qpass.packing import gathered
from qpass.passes.annotate import weight_source
from qpass.passes.fold_norm import NORM, norm_affine, scaled_weight
from qpass.passes.scalable import passes, upper_bound

aten = torch.ops.aten
Products = dict[fx.Node, Tensor]  # x * m -> m [C]


def scale_inputs(gm: fx.GraphModule) -> Products:
    """Applies 1; convolutions that read one x with equal factors share the product."""
    made: Products = {}
    for node in list(gm.graph.nodes):
        if not is_convolution(node):
            continue
        source = weight_source(node.args[1])
        if source is None or source.packed is None or source.in_mul is None:
            continue
        factor = constant(source.in_mul)
        assert factor is not None
        node.update_arg(1, source.packed)
        scale_input(gm, node, gathered(factor, int(node.args[8]), bool(node.args[6])), made)
    return made


def scale_input(gm: fx.GraphModule, node: fx.Node, factor: Tensor, made: Products) -> None:
    """The input of a convolution times m [C], a product that is shared and added to `made`."""
    x = node.args[0]
    shared = (p for p, known in made.items() if p.args[0] is x and torch.equal(known, factor))
    if (product := next(shared, None)) is None:
        product = _product(gm, x, factor, node)
        made[product] = factor
    node.update_arg(0, product)


def take_up(gm: fx.GraphModule, products: Products) -> int:
    """Applies 2 to 5, from outputs to inputs; returns the number of steps."""
    edits = 0
    for node in reversed(list(gm.graph.nodes)):
        users = list(node.users)
        factor = products.get(users[0]) if users else None
        if factor is None or node.op != "call_function":
            continue
        if not all(user in products and torch.equal(products[user], factor) for user in users):
            continue
        made = _moved(gm, node, factor, products)
        if made is None:
            continue
        made.meta |= {key: node.meta[key] for key in ("decision", "output_decision") if key in node.meta}
        made.meta["out_mul"] = factor
        for user in users:
            user.replace_all_uses_with(made)
            gm.graph.erase_node(user)
            del products[user]
        if made is not node:
            gm.graph.erase_node(node)
        edits += 1
    gm.graph.eliminate_dead_code()
    return edits


def _moved(gm: fx.GraphModule, node: fx.Node, factor: Tensor, products: Products) -> fx.Node | None:
    """What computes node * m with the factor inside; None where it cannot go there."""
    if is_convolution(node):
        return _scaled_product(gm, node, factor)
    if node.target is NORM:
        return _scaled_norm(gm, node, factor)
    x = node.args[0]
    if not isinstance(x, fx.Node) or not passes(node, x):
        return None
    product = _product(gm, x, factor, node)
    products[product] = factor
    if (bound := upper_bound(node)) is None:
        node.update_arg(0, product)
        return node
    value = node.meta["val"]
    held = (bound * factor.double()).to(value.dtype).reshape(-1, *[1] * (value.dim() - 2))
    limit = add_constant(gm, f"{node.meta.get('site', 'relu6')}_bound", held, node)
    return add_call(gm, aten.minimum.default, (add_call(gm, aten.relu.default, (product,), node), limit), node)


def _product(gm: fx.GraphModule, x: fx.Node, factor: Tensor, before: fx.Node) -> fx.Node:
    value = x.meta["val"]
    shaped = factor.to(value.dtype).reshape(-1, *[1] * (value.dim() - 2))
    held = add_constant(gm, f"{before.meta.get('site', 'conv')}_in_mul", shaped, before)
    return add_call(gm, aten.mul.Tensor, (x, held), before)


def _scaled_norm(gm: fx.GraphModule, node: fx.Node, factor: Tensor) -> fx.Node | None:
    if norm_affine(node) is None:
        return None
    gamma, beta = (None if n is None else constant(n) for n in node.args[1:3])
    like = constant(node.args[3])
    assert like is not None
    scaled = factor.to(like.dtype) if gamma is None else (gamma.detach().double() * factor).to(gamma.dtype)
    node.update_arg(1, add_constant(gm, "norm_folded", scaled, node))
    if beta is not None:
        node.update_arg(2, add_constant(gm, "norm_folded", (beta.detach().double() * factor).to(beta.dtype), node))
    return node


def _scaled_product(gm: fx.GraphModule, node: fx.Node, factor: Tensor) -> fx.Node | None:
    bias, turned = constant(node.args[2]), bool(node.args[6])
    if (node.args[2] is not None and bias is None) or (turned and node.args[8] != 1):
        return None
    weight = scaled_weight(gm, node, factor.double(), int(turned))
    if weight is None:
        return None
    node.update_arg(1, weight)
    if bias is not None:
        folded = (bias.detach().double() * factor).to(bias.dtype)
        node.update_arg(2, add_constant(gm, f"{node.meta.get('site', 'conv')}_folded", folded, node))
    return node
