"""Find the output layer of a language model in a graph alone, where there is no model to ask for it.

    embedding(w [V, H], i) ... linear(x, h [V, H]) -> casts, slices, factors, tanh -> output

1. the linear's weight has the shape of a table that the same graph looks up;
2. nothing but the graph's output reads the linear's result, through operations that keep its elements apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from qpass.graphs import is_view

aten = torch.ops.aten


def makes_logits(nodes: Mapping[str, fx.Node]) -> set[str]:
    """Names of the sites (name -> node) that are output layers."""
    tables = {_shape(node.args[0]) for node in nodes.values() if node.target is aten.embedding.default}
    linears = {name: node for name, node in nodes.items() if node.target is aten.linear.default}
    return {name for name, node in linears.items() if _shape(node.args[1]) in tables and _goes_out(node)}


def _shape(node: fx.Node) -> tuple:
    return tuple(node.meta["val"].shape)


def _goes_out(node: fx.Node) -> bool:
    """Whether all readers of a value are the graph's output, or pass it on there."""
    return bool(node.users) and all(
        user.op == "output" or (_passes_on(user) and _goes_out(user)) for user in node.users
    )


def _passes_on(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or is_view(node)
                                                          or target is aten.to.dtype)  # fmt: skip
