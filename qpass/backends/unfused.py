"""A weight-only linear taken apart again, where a backend has no kernel for its weight but generates one that dequantizes.

qpass.linear(x float, w, b, other, act)   ->   act(linear(x, dequantize(w), b) + other)
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.backends.onednn import ACTIVATION_CALLS
from qpass.graphs import add_call

aten = torch.ops.aten
Q = torch.ops.qpass


def lower_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The nodes that compute a fused linear of a float input, in front of `node`; returns the last."""
    x, data, scale, weight_type, bias, other, act, dtype, zero = (node.args[i] for i in (0, 4, 5, 6, 7, 8, 9, 13, 14))
    own = x.meta["val"].dtype
    y = add_call(gm, Q.dequantize.default, (data, scale, zero, weight_type, own), node)
    y = add_call(gm, aten.linear.default, (x, y, bias), node)
    if other is not None:
        y = add_call(gm, aten.add.Tensor, (y, other), node)
    if act:
        target, options = ACTIVATION_CALLS[act]
        y = add_call(gm, target, (y,), node, **options)
    return y if dtype is own else add_call(gm, aten.to.dtype, (y, dtype), node)
