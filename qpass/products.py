"""Every product of an activation with one matrix of the model becomes `linear(x, w, b)`.

    mm(x, w), matmul(x, w)          ->   linear(x, t(w))
    mv(w, x), matmul(w, x)          ->   linear(x, w), or transposed around it:  (w x)^T = x^T w^T
    addmm(b, x, w)                  ->   linear(x, t(w), b), or + b where b is not one row
    einsum("...k,nk->...n", x, w)   ->   linear(x, w);  "...k,kn->...n": linear(x, t(w))

1. `w` is a parameter or buffer of two dimensions, or a view of one that only transposes it;
2. factors of addmm (alpha, beta) are 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qpass.arity import full_arity

aten = torch.ops.aten
MATMULS = (aten.mm.default, aten.matmul.default, aten.mv.default)
# other spellings of the transpose of a matrix
TRANSPOSES = (aten.numpy_T.default, aten.mT.default, aten.matrix_H.default, aten.adjoint.default, aten.swapaxes.default,
              aten.swapdims.default, aten.transpose.int, aten.permute.default)  # fmt: skip


def is_parameter(node: object) -> bool:
    """Whether a node is a parameter or buffer of the model, or is computed from these alone by views and dequantize."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "placeholder":
        return "fqn" in node.meta
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(is_parameter(i) for i in inputs)


def to_linear(graph: fx.Graph, node: fx.Node) -> None:
    """Rewrites one node of a graph to `linear`, in place, where it is such a product."""
    if node.target in TRANSPOSES:
        _one_transpose(node)
    elif node.target in MATMULS:
        _matmul(graph, node)
    elif node.target is aten.addmm.default:
        _addmm(graph, node)
    elif node.target is aten.einsum.default:
        _einsum(graph, node)


def _one_transpose(node: fx.Node) -> None:
    """The transpose of a parameter matrix is spelled aten.t."""
    before, after = node.args[0].meta["val"], node.meta["val"]
    turned = str(tuple(after.stride())) == str(tuple(before.stride())[::-1])
    if before.dim() == 2 and is_parameter(node.args[0]) and turned and after.shape == before.shape[::-1]:
        node.target, node.args, node.kwargs = aten.t.default, (node.args[0],), {}


def _is_matrix(node: Any) -> bool:
    return is_parameter(node) and node.meta["val"].dim() == 2


def _matmul(graph: fx.Graph, node: fx.Node) -> None:
    left, right = node.args[:2]
    if _is_matrix(right):
        _become(node, left, _view(graph, node, aten.t.default, right), None)
    elif _is_matrix(left) and not is_parameter(right):
        dims = right.meta["val"].dim()
        if dims == 1:
            _become(node, right, left, None)
        elif dims >= 2:
            turned = _view(graph, node, aten.transpose.int, right, -2, -1)
            product = _linear(graph, node, turned, left)
            node.target, node.args, node.kwargs = aten.transpose.int, (product, -2, -1), {}


def _addmm(graph: fx.Graph, node: fx.Node) -> None:
    (bias, x, weight), options = full_arity(node.target, node.args, node.kwargs)
    if not _is_matrix(weight) or options["beta"] != 1 or options["alpha"] != 1:
        return
    turned = _view(graph, node, aten.t.default, weight)
    value = bias.meta["val"]
    if value.dim() == 1 and value.shape[0] == weight.meta["val"].shape[1]:
        _become(node, x, turned, bias)
        return
    product = _linear(graph, node, x, turned)
    node.target, node.args, node.kwargs = aten.add.Tensor, (product, bias), {}


def _einsum(graph: fx.Graph, node: fx.Node) -> None:
    terms, arrow, result = node.args[0].replace(" ", "").partition("->")
    names, operands = terms.split(","), node.args[1]
    if len(names) != 2 or not arrow:
        return
    (x_name, x), (w_name, weight) = zip(names, operands, strict=True)
    if _is_matrix(x) and not _is_matrix(weight):
        (x_name, x), (w_name, weight) = (w_name, weight), (x_name, x)
    if not _is_matrix(weight) or is_parameter(x) or len(w_name) != 2 or w_name[0] == w_name[1] or not x_name:
        return
    shared, lead = x_name[-1], x_name[:-1]
    other = w_name.replace(shared, "")
    if len(other) != 1 or other in x_name or shared in lead or result != lead + other:
        return
    _become(node, x, weight if w_name[1] == shared else _view(graph, node, aten.t.default, weight), None)


def _become(node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    node.target, node.args, node.kwargs = aten.linear.default, (x, weight, bias), {}


def _view(graph: fx.Graph, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    value: Tensor = args[0].meta["val"]
    return _call(graph, before, target, args, target(value, *args[1:]))


def _linear(graph: fx.Graph, before: fx.Node, x: fx.Node, weight: fx.Node) -> fx.Node:
    value = torch.nn.functional.linear(x.meta["val"], weight.meta["val"])
    return _call(graph, before, aten.linear.default, (x, weight, None), value)


def _call(graph: fx.Graph, before: fx.Node, target: Any, args: tuple[Any, ...], value: Tensor) -> fx.Node:
    with graph.inserting_before(before):
        call = graph.call_function(target, args)
    call.meta = {"val": value, "nn_module_stack": before.meta.get("nn_module_stack", {})}
    return call
