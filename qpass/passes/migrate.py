"""Move the per-channel factor of a packed weight onto the activation, and into what made it where that is free.

    1. linear(x, dequantize(w, s) * m, b)          ->  linear(x * m, dequantize(w, s), b)
    2. layer_norm(x, shape, g, b) * m              ->  layer_norm(x, shape, g * m, b * m)       also rms_norm, and y * g
    3. linear(x, dequantize(w, s), b) * m          ->  linear(x, dequantize(w, s * m), b * m)
    4. embedding(dequantize(w, s) * m, i)          ->  embedding(dequantize(w, s), i) * m       a table tied to a linear

Exact in real arithmetic (SmoothQuant, 2211.10438, eq. 3). 2 and 3 need the factor to be the only user of the norm or
linear; elsewhere (a norm that also feeds a residual) the product stays in front of the quantize, which absorbs it.
Linears that read the same x with equal factors share one product. For convolutions see migrate_conv.py.
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.graphs import add_call, add_constant, constant, single_user
from qpass.passes.annotate import WeightSource, weight_source
from qpass.passes.migrate_conv import scale_inputs, take_up

aten = torch.ops.aten
qpass = torch.ops.qpass

NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def migrate(gm: fx.GraphModule, context) -> int:
    """Applies 1 to 4; returns the number of linears and lookups changed."""
    shared: list[tuple[fx.Node, torch.Tensor, fx.Node]] = []
    edits = 0
    for node in list(gm.graph.nodes):
        if node.target is aten.embedding.default:
            edits += _lookup(gm, node)
        if node.target is not aten.linear.default:
            continue
        source = weight_source(node.args[1])
        if source is None or source.packed is None or not _along_outputs(source):
            continue
        factor = None if source.in_mul is None else constant(_base(source.in_mul))
        weight = _plain_weight(gm, source, node)
        x = node.args[0] if factor is None else _scaled(gm, node, factor, shared)
        node.args = (x, weight, *node.args[2:])
        edits += 1
    edits += sum(_fold(gm, product) for _, _, product in shared)
    products = scale_inputs(gm)
    edits += len(products) + take_up(gm, products)
    gm.graph.eliminate_dead_code()
    return edits


def _lookup(gm: fx.GraphModule, node: fx.Node) -> int:
    """4: the factor is applied to the rows that are read, so that the table itself stays in integers."""
    source = weight_source(node.args[0])
    if source is None or source.packed is None or source.in_mul is None or source.type.endswith("/c1"):
        return 0
    if node.args[0].target is not aten.mul.Tensor:
        return 0
    factor = source.in_mul
    node.update_arg(0, source.packed)
    with gm.graph.inserting_after(node):
        product = gm.graph.call_function(aten.mul.Tensor, (node, factor))
    node.replace_all_uses_with(product, lambda user: user is not product)
    product.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
    return 1


def _along_outputs(source: WeightSource) -> bool:
    """Whether the scales of a packed weight belong to outputs; one that is also read the other way has them of inputs."""
    return source.type.endswith("/c1") == source.transposed


def _base(node: fx.Node) -> fx.Node:
    """The constant under a chain of views."""
    while node.op == "call_function":
        node = node.args[0]
    return node


def _plain_weight(gm, source, before: fx.Node) -> fx.Node:
    """dequantize(w, s, z, "i8/c0") of the integers as [N, K], whatever stood between."""
    if not source.transposed:
        return source.packed
    if source.packed.target is qpass.nested.default:
        args = (value.replace("/c1", "/c0") if isinstance(value, str) else value for value in source.packed.args)
        return add_call(gm, qpass.nested.default, tuple(args), before)
    data, scale, zero, qtype, dtype = source.packed.args
    turned = add_call(gm, aten.t.default, (data,), before)
    return add_call(gm, qpass.dequantize.default, (turned, scale, zero, qtype.replace("/c1", "/c0"), dtype), before)


def _scaled(gm, node: fx.Node, factor: torch.Tensor, shared: list) -> fx.Node:
    x = node.args[0]
    for other, known, product in shared:
        if other is x and torch.equal(known, factor):
            return product
    held = add_constant(gm, f"{node.meta.get('site', 'linear')}_in_mul", factor.to(x.meta["val"].dtype), node)
    product = add_call(gm, aten.mul.Tensor, (x, held), node)
    shared.append((x, factor, product))
    return product


def _fold(gm: fx.GraphModule, product: fx.Node) -> int:
    maker, held = product.args
    if maker.op != "call_function" or single_user(maker) is not product:
        return 0
    factor = constant(held)
    if maker.target in NORMS:
        changed = {2: maker.args[2]} | ({3: maker.args[3]} if maker.target is aten.layer_norm.default else {})
    elif maker.target is aten.mul.Tensor and (index := _gain(maker, factor)) is not None:
        changed = {index: maker.args[index]}
    elif maker.target is aten.linear.default and _foldable(maker):
        changed = {2: maker.args[2]}
        _scale_rows(gm, maker, factor)
        maker.meta["out_mul"] = factor
    else:
        return 0
    for index, node in changed.items():
        value = constant(node)
        if value is None and index == 2 and maker.target in NORMS:
            value = torch.ones_like(factor)
        if value is not None:
            maker.update_arg(index, add_constant(gm, f"{product.meta.get('site', '')}_folded", value * factor, maker))
    product.replace_all_uses_with(maker)
    gm.graph.erase_node(product)
    return 1


def _gain(maker: fx.Node, factor: torch.Tensor) -> int | None:
    """Which operand of a product is a constant for each channel: the weight of a norm that is spelled out; or None."""
    held = (constant(node) if isinstance(node, fx.Node) else None for node in maker.args[:2])
    return next((i for i, value in enumerate(held) if value is not None and value.shape == factor.shape), None)


def _foldable(maker: fx.Node) -> bool:
    weight = maker.args[1]
    return (
        isinstance(weight, fx.Node)
        and weight.target is qpass.dequantize.default
        and len(weight.users) == 1
        and weight.args[3].endswith("/c0")
        and (maker.args[2] is None or constant(maker.args[2]) is not None)
    )


def _scale_rows(gm: fx.GraphModule, maker: fx.Node, factor: torch.Tensor) -> None:
    weight = maker.args[1]
    weight.update_arg(1, add_constant(gm, "folded_scale", constant(weight.args[1]) * factor.float(), weight))
