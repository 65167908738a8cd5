"""One spelling per operation, so that every later pass matches each of them once.

1. arguments are positional at full arity (defaults written out);
2. what does nothing at inference is dropped: dropout, detach, alias, a cast to the same type, a view to the same shape;
3. every product of an activation with a matrix of the model is a `linear` (products.py);
4. every convolution is an `aten.convolution` (convolutions.py);
5. rows of a parameter, and of what it is packed as, are a `slice` of it, or the part itself (slices.py);
6. an in-place activation or sum whose input nobody else reads becomes the plain one.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.arity import full_arity
from qpass.convolutions import to_convolution
from qpass.graphs import is_view
from qpass.products import to_linear
from qpass.slices import piece_of, to_slice

aten = torch.ops.aten

IDENTITIES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)
CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.contiguous.default,
    aten._to_copy.default,
)
RESHAPES = (aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default)
IN_PLACE = (
    (aten.relu_.default, aten.relu.default),
    (aten.silu_.default, aten.silu.default),
    (aten.gelu_.default, aten.gelu.default),
    (aten.hardswish_.default, aten.hardswish.default),
    (aten.hardtanh_.default, aten.hardtanh.default),
    (aten.sigmoid_.default, aten.sigmoid.default),
    (aten.tanh_.default, aten.tanh.default),
    (aten.leaky_relu_.default, aten.leaky_relu.default),
    (aten.hardsigmoid_.default, aten.hardsigmoid.default),
    (aten.add_.Tensor, aten.add.Tensor),
    (aten.mul_.Tensor, aten.mul.Tensor),
    (aten.dropout_.default, aten.dropout.default),
)
DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default)


def canonicalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Brings a traced graph into canonical form, in place."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        _make_functional(node)
        to_slice(node)
        if (source := _unchanged(node) or piece_of(node)) is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            continue
        to_linear(gm.graph, node)
        to_convolution(gm, node)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = full_arity(node.target, node.args, node.kwargs)
    gm.graph.eliminate_dead_code(is_impure_node=is_impure)
    gm.recompile()
    return gm


def is_impure(node: fx.Node) -> bool:
    """Whether a node must stay though nobody reads it."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or not schema.returns)


def _make_functional(node: fx.Node) -> None:
    plain = dict(IN_PLACE).get(node.target)
    source = node.args[0] if node.args else None
    if plain is None or not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) != 1:
        return
    if not is_view(source) and all(_like(i, source) for i in node.all_input_nodes):
        node.target = plain


def _like(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operand leaves the dtype of the result that of `source`."""
    value, own = node.meta.get("val"), source.meta["val"]
    return isinstance(value, Tensor) and value.dtype == own.dtype and value.dim() <= own.dim()


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The input that a node returns as it is, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in IDENTITIES:
        return source
    if node.target in DROPOUTS:
        train = node.args[2] if len(node.args) > 2 else node.kwargs.get("train")
        return None if train else source
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if node.target in CASTS:
        copied = node.kwargs.get("copy") or (node.target is aten._to_copy.default and source.op == "placeholder")
        same = before.dtype == after.dtype and before.device == after.device and before.layout == after.layout
        return source if same and not copied and _same_strides(before, after) else None
    if node.target in RESHAPES:
        return source if before.dim() == after.dim() and _same_sizes(before, after) else None
    return None


def _same_sizes(a: Tensor, b: Tensor) -> bool:
    """Sizes are equal as expressions; two symbols that happen to be equal today are not."""
    return all(str(m) == str(n) for m, n in zip(a.shape, b.shape, strict=True))


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(str(m) == str(n) for m, n in zip(a.stride(), b.stride(), strict=True))
