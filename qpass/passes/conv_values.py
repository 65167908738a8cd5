"""Values that convolutions leave for others than sites to read, and that can be kept as integers all the same.

    y = act(bn(conv(x)) + other)     read by: a residual add, a mean, a product (squeeze-excite), a concatenate, a pool

Where nothing quantizes such a y it would lie in memory as float between two integer convolutions. It gets a name of its own,
the convolution's with `.output`, a range from calibration, and with a static scheme a type; `insert-qdq` lets those readers
read its integers. A y that a site reads is quantized by that site's decision.

1. the chain from the convolution to y is fused: batch norm, one add, one activation, each with one reader;
2. of an add of two such chains the later one is fused, the earlier one ends in front of it;
3. at least one reader is in READERS, and none is the output of the graph.

A y that one add alone reads, which is fused into a later convolution, is an operand (`is_operand`): its rounding would not be
shared with anything and falls on the sum in full, so where the processor has bfloat16 it is kept in that.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.convolutions import is_convolution
from qpass.graphs import single_user

aten = torch.ops.aten

OUTPUT = ".output"  # what is added to the name of a site
BATCH_NORM = aten.batch_norm.default
ADDS = (aten.add.Tensor,)
ACTIVATIONS = (
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.sigmoid.default,
    aten.prelu.default,
    aten.leaky_relu.default,
)
READERS = (
    *ADDS,
    aten.mul.Tensor,
    aten.mean.dim,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    aten.cat.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
)


def chain_end(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """The value that a convolution and what is fused behind it leave."""
    while (user := single_user(node)) is not None:
        norm = user.target is BATCH_NORM and is_convolution(node)
        added = user.target in ADDS and fuses_into(user, node, order)
        activated = user.target in ACTIVATIONS and user.args[0] is node
        if not (norm or added or activated):
            return node
        node = user
        if activated:
            return node
    return node


def fuses_into(add: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether an add becomes part of the convolution that ends in `node`: of two that could take it, the later one does."""
    a, b = add.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b or add.kwargs.get("alpha", 1) != 1:
        return False
    if not _same_shape(a, b) or not _is_product(node):
        return False
    other = b if node is a else a
    return not _is_product(other) or single_user(other) is None or order[other] < order[node]


def _is_product(node: fx.Node) -> bool:
    """A convolution, or its batch norm, with one reader."""
    if single_user(node) is None:
        return False
    return is_convolution(node) or (
        node.target is BATCH_NORM and is_convolution(node.args[0]) and single_user(node.args[0]) is node
    )


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    values = a.meta.get("val"), b.meta.get("val")
    if not all(isinstance(v, Tensor) for v in values):
        return False
    return str(values[0].shape) == str(values[1].shape) and values[0].dtype == values[1].dtype


def is_operand(node: fx.Node) -> bool:
    """Whether a value is read once, by the add of a later convolution's result."""
    add = single_user(node)
    if add is None or add.target not in ADDS or len(add.args) < 2:
        return False
    a, b = add.args[:2]
    other = b if node is a else a
    ends = isinstance(other, fx.Node) and other is not node and _is_product(other)
    return ends and _same_shape(node, other) and add.kwargs.get("alpha", 1) == 1


def outputs_to_quantize(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Name -> value, for a graph whose sites have names."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if not is_convolution(node) or "site" not in node.meta:
            continue
        value = chain_end(node, order)
        readers = list(value.users)
        if any(user.target in READERS for user in readers) and not any(user.op == "output" for user in readers):
            found[node.meta["site"] + OUTPUT] = value
    return found
