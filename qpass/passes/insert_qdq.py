"""Insert quantize and dequantize as the plan says: the one step that changes what the graph computes.

    linear(x, w, b)   ->   linear(dequantize(quantize(x, s, z)), dequantize(w_q, s_w), b)     static
                      ->   s, z = choose_qparams(x); the same                                  dynamic
                      ->   linear(x, dequantize(w_q, s_w), b)                                  weight-only

A value that several sites read with the same parameters is quantized once and dequantized once per use, so that a use
can be fused without the others. What a convolution leaves for a residual add, a mean or a concatenate to read is quantized
too, where the plan has a type for it (conv_values.py). Attention is computed in the plan's dtype, where it names one.
A weight that is still float (the torch.compile spelling, where there is no copy of the model to pack) is packed here,
from the plan.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from qpass.convolutions import is_convolution
from qpass.graphs import add_call, add_constant, constant
from qpass.passes.annotate import weight_source
from qpass.passes.conv_values import READERS
from qpass.passes.migrate_conv import Products, scale_input, take_up
from qpass.passes.split_channels import split_channels
from qpass.plan import Decision
from qpass.qtype import QType

aten = torch.ops.aten
qpass = torch.ops.qpass
VIEWS = (aten.view.default, aten.transpose.int, aten.permute.default, aten.reshape.default, aten.unsqueeze.default)


def insert_qdq(gm: fx.GraphModule, context) -> int:
    """Rewrites each site that has a decision to quantize; returns their number."""
    quantized: dict[tuple, tuple] = {}
    edits = 0
    products: Products = {}
    sites = [node for node in gm.graph.nodes if _is_site(node)]
    for node in sites:
        if _pack(gm, node, node.meta["decision"], products) and node.meta["decision"].input_type is None:
            _correct_bias(gm, node, node.meta["decision"])
    tables = [node for node in gm.graph.nodes if _is_table(node)]
    for node in tables:
        _pack(gm, node, node.meta["decision"], products, 0)
    take_up(gm, products)
    for node in list(gm.graph.nodes):
        if (output := node.meta.get("output_decision")) is not None:
            edits += _quantize_output(gm, node, output, quantized)
    for node in sites:
        decision: Decision = node.meta["decision"]
        if decision.input_type is not None:
            _correct_bias(gm, node, decision)
            if decision.input_extra is not None:
                split_channels(gm, node, decision)
            _quantize_input(gm, node, decision, quantized)
        edits += 1
    if context.plan.attention is not None:
        edits += sum(_cast_attention(gm, node, context.plan.attention) for node in list(gm.graph.nodes))
    gm.graph.eliminate_dead_code()
    return edits + len(tables)


def _is_site(node: fx.Node) -> bool:
    """Whether a node has a decision to quantize it."""
    decision: Decision | None = node.meta.get("decision")
    product = node.target is aten.linear.default or is_convolution(node)
    return product and decision is not None and decision.quantized


def _is_table(node: fx.Node) -> bool:
    """Whether a node looks rows up in a table with a decision to quantize it."""
    decision: Decision | None = node.meta.get("decision")
    return node.target is aten.embedding.default and decision is not None and decision.quantized


def _cast_attention(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> int:
    """attention(q, k, v) -> float(attention(bf16(q), bf16(k), bf16(v))); a cast goes in front of views of its input."""
    if node.target is not aten.scaled_dot_product_attention.default or node.meta["val"].dtype is not torch.float32:
        return 0
    inputs = [_cast(gm, x, dtype, node) for x in node.args[:3]]
    mask = node.args[3]
    if mask is not None and mask.meta["val"].is_floating_point():
        mask = add_call(gm, aten.to.dtype, (mask, dtype), node)
    narrow = add_call(gm, node.target, (*inputs, mask, *node.args[4:]), node, **node.kwargs)
    node.replace_all_uses_with(add_call(gm, aten.to.dtype, (narrow, torch.float32), node))
    gm.graph.erase_node(node)
    return 1


def _cast(gm: fx.GraphModule, x: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    if x.op == "call_function" and x.target in VIEWS and len(x.users) == 1:
        source = _cast(gm, x.args[0], dtype, x)
        return add_call(gm, x.target, (source, *x.args[1:]), before)
    return add_call(gm, aten.to.dtype, (x, dtype), before)


def _pack(gm: fx.GraphModule, node: fx.Node, decision: Decision, products: Products, place: int = 1) -> bool:
    """Packs the weight that is argument `place` of a node, where it is still float; returns whether it was."""
    source = weight_source(node.args[place])
    packed = decision.packed
    if source is None or source.packed is not None or packed is None:
        return False
    turned = packed.type.axis == 1 and packed.stored.dim() == 2
    data = packed.data.t().contiguous() if turned else packed.data
    qtype = str(dataclasses.replace(packed.type, axis=0) if turned else packed.type)
    held = add_constant(gm, f"{decision.weight}_q", data, node)
    scale = add_constant(gm, f"{decision.weight}_scale", packed.scale, node)
    zero = None if packed.zero is None else add_constant(gm, f"{decision.weight}_zero", packed.zero, node)
    dtype = node.args[place].meta["val"].dtype
    node.update_arg(place, add_call(gm, qpass.dequantize.default, (held, scale, zero, qtype, dtype), node))
    if packed.in_mul is not None and is_convolution(node):
        scale_input(gm, node, packed.in_mul, products)
    elif packed.in_mul is not None and place == 0:
        _scale_rows(gm, node, decision, packed.in_mul)
    elif packed.in_mul is not None:
        x = node.args[0]
        factor = add_constant(gm, f"{decision.weight}_in_mul", packed.in_mul.to(x.meta["val"].dtype), node)
        node.update_arg(0, add_call(gm, aten.mul.Tensor, (x, factor), node))
    return True


def _scale_rows(gm: fx.GraphModule, node: fx.Node, decision: Decision, in_mul: Tensor) -> None:
    """embedding(w, i)  ->  embedding(w, i) * m: a table tied to a linear whose inputs have a factor."""
    value = node.meta["val"]
    factor = add_constant(gm, f"{decision.weight}_in_mul", in_mul.to(value.dtype), node.next)
    product = add_call(gm, aten.mul.Tensor, (node, factor), node.next)
    node.replace_all_uses_with(product, lambda user: user is not product)


def _correct_bias(gm: fx.GraphModule, node: fx.Node, decision: Decision) -> None:
    """B  ->  b + what the plan adds to it, so that the mean of every output stays where it was."""
    if decision.bias is None:
        return
    own, more, factor = constant(node.args[2]), decision.bias, node.meta.get("out_mul")
    more = more if factor is None else more * factor.float()
    bias = more if own is None else more.to(own.device) + own.detach().float()
    node.update_arg(2, add_constant(gm, f"{decision.site}_bias", bias.to(node.meta["val"].dtype), node))


def _shifted(gm: fx.GraphModule, x: fx.Node, decision: Decision, before: fx.Node) -> fx.Node:
    """X * v  ->  (x - c) * v, as x * v - c * v."""
    if decision.input_shift is None:
        return x
    offset = decision.input_shift * decision.packed.in_mul
    held = add_constant(gm, f"{decision.site}_shift", offset.to(x.meta["val"].dtype), before)
    return add_call(gm, aten.sub.Tensor, (x, held), before)


def _quantize_output(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantized: dict) -> int:
    """Readers that can do with integers read those of `node`; an operand of one add is bfloat16 on its way there."""
    readers = [user for user in node.users if user.target in READERS]
    if not readers or not _scaled_as(node, decision.input_mul):
        return 0
    dtype = node.meta["val"].dtype
    if decision.input_type is None:
        if dtype is torch.float32:
            narrow = add_call(gm, aten.to.dtype, (node, torch.bfloat16), node.next)
            readers[0].replace_input_with(node, add_call(gm, aten.to.dtype, (narrow, dtype), readers[0]))
        return 1
    held = _codes(gm, node, decision, quantized, node.next)
    for user in readers:
        real = (*held, dtype)
        user.replace_input_with(node, add_call(gm, qpass.dequantize.default, real, user))
    return 1


def _scaled_as(node: fx.Node, factor: Tensor | None) -> bool:
    """Whether a value has the factor that its scale was chosen for: without the readers it was meant for it may lack it."""
    found = node.meta.get("out_mul")
    return found is None if factor is None else found is not None and torch.equal(found, factor)


def _quantize_input(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantized: dict) -> None:
    x = node.args[0]
    held = _codes(gm, x, decision, quantized, node)
    real = (*held, x.meta["val"].dtype)
    node.update_arg(0, add_call(gm, qpass.dequantize.default, real, node))


def _codes(gm: fx.GraphModule, x: fx.Node, decision: Decision, quantized: dict, node: fx.Node) -> tuple:
    """(integers, scale, zero point, their type) of a value, made once for all that read it with these parameters."""
    qtype = str(decision.input_type)
    static = decision.input_scale is not None
    symmetric = decision.input_zero is None
    known = (float(decision.input_scale), 0 if symmetric else int(decision.input_zero)) if static else ()
    key = (x, qtype, known)
    if key not in quantized:
        shifted = _shifted(gm, x, decision, node)
        if static:
            scale = add_constant(gm, f"{decision.site}_input_scale", decision.input_scale, node)
            zero = None if symmetric else add_constant(gm, f"{decision.site}_input_zero", decision.input_zero, node)
        else:
            scale, zero = _choose(gm, shifted, qtype, node)
        bare = str(decision.input_type.bare)
        codes = add_call(gm, qpass.quantize.default, (shifted, scale, zero, bare), node)
        codes.meta["quantizes"] = []  # the names of all decisions that it carries out
        quantized[key] = (codes, scale, zero, bare)
    quantized[key][0].meta["quantizes"].append(decision.site)
    return quantized[key]


def _choose(gm: fx.GraphModule, x: fx.Node, qtype: str, before: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    import operator

    both = add_call(gm, qpass.choose_qparams.default, (x, qtype), before)
    scale = add_call(gm, operator.getitem, (both, 0), before)
    return scale, None if QType.parse(qtype).symmetric else add_call(gm, operator.getitem, (both, 1), before)
