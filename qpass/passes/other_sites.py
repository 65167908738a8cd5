"""Operations that multiply and that no scheme quantizes, each with the sentence that says why.

An operation that is not in the table but reads a matrix of the model and an activation (a custom op, grouped experts,
a bilinear form) is a site too, so that no weight stays float in silence.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.products import is_parameter

aten = torch.ops.aten

TWO_ACTIVATIONS = "no operand of it is one matrix of the model; schemes quantize products with a weight"
LOOKUP = "embedding"
RECURRENT = "a recurrent cell is one opaque operation to the front end"
OTHER_SITES = (
    (aten.scaled_dot_product_attention.default, "attention", TWO_ACTIVATIONS),
    (aten.matmul.default, "matmul", TWO_ACTIVATIONS),
    (aten.bmm.default, "matmul", TWO_ACTIVATIONS),
    (aten.mm.default, "matmul", TWO_ACTIVATIONS),
    (aten.addmm.default, "matmul", "its factors alpha and beta are not 1, or no operand of it is a weight"),
    (aten.einsum.default, "einsum", TWO_ACTIVATIONS),
    (aten.baddbmm.default, "matmul", TWO_ACTIVATIONS),
    (
        aten.embedding.default,
        LOOKUP,
        "a table is looked up, not multiplied by: it stays float unless a recipe names it",
    ),
    (aten.lstm.input, "lstm", RECURRENT),
    (aten.gru.input, "gru", RECURRENT),
    (aten.rnn_tanh.input, "rnn", RECURRENT),
    (aten.rnn_relu.input, "rnn", RECURRENT),
)
UNKNOWN = "schemes quantize products of an activation with one matrix; this operation reads its weight in another way"
# they move or look up the values of a weight, or join them to an activation, and multiply nothing
MOVES = (
    *(aten.cat.default, aten.stack.default, aten.index.Tensor, aten.gather.default, aten.index_select.default),
    *(aten.take.default, aten.embedding_bag.default, aten.copy_.default, aten.where.self, aten.index_put.default),
    *(aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default),
    *(aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default, aten.group_norm.default),
)


def other_operation(node: fx.Node) -> str | None:
    """The name of the operation where a node multiplies in a way that no scheme quantizes; None elsewhere."""
    known = next((operation for target, operation, _ in OTHER_SITES if target is node.target), None)
    if known or node.target in MOVES or not isinstance(node.target, torch._ops.OpOverload):
        return known
    if torch.Tag.pointwise in node.target.tags or node.target._schema.name.startswith("qpass::"):
        return None
    inputs = [i for i in node.all_input_nodes if _is_float(i)]
    weights = [i for i in inputs if is_parameter(i) and i.meta["val"].dim() > 1]
    if not weights or all(is_parameter(i) for i in inputs):
        return None
    return node.target._schema.name.partition("::")[2]


def why_not(operation: str) -> str:
    """The sentence for an operation's name."""
    return next((why for _, name, why in OTHER_SITES if name == operation), UNKNOWN)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
