"""Fused linears on oneDNN's int8 matmul, through torch's own op.

    qpass.linear(x u8/t, w i8/c0, b, act, -> u8 | f32 | bf16)   ->   onednn.qlinear_pointwise, one call
    qpass.linear(x u8/token, ...)                              ->   onednn.qlinear_pointwise, then rows scaled:

        y = s_r * (acc - (z_r - 128) * colsum) + b,   acc = scale_n * sum_k (q_rk - 128) w_nk

The weight is packed into oneDNN's layout once, when the graph is lowered. Inputs are uint8 on purpose: on x86 without
AMX oneDNN runs int8 inputs through a reference loop a thousand times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.graphs import add_call, add_constant, constant
from qpass.shared import made_once

aten = torch.ops.aten
onednn = torch.ops.onednn
Q = torch.ops.qpass

# activation of qpass.linear -> oneDNN post-op name and algorithm
POST_OPS = (
    ("", "none", ""),
    ("relu", "relu", ""),
    ("gelu", "gelu", "none"),
    ("gelu_tanh", "gelu", "tanh"),
    ("silu", "swish", ""),
)
ACTIVATION_CALLS = {
    "relu": (aten.relu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "silu": (aten.silu.default, {}),
}
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
CENTRE = 128


def prepack(data: Tensor) -> Tensor:
    """int8 [N, K] -> oneDNN's blocked layout, an opaque tensor."""
    return onednn.qlinear_prepack.default(data.contiguous(), None)


def lower_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The nodes that compute a fused linear on oneDNN, in front of `node`; returns the last."""
    if node.args[3] == "u8/token":
        return _lower_dynamic(gm, node)
    (x, x_scale, x_zero, _, data, w_scale, _, bias, other, act, out_scale, out_zero, out_type, dtype, _) = node.args
    absorbed = other is None and (out_type or dtype in OUTPUTS)
    scale, zero = float(constant(x_scale)), int(constant(x_zero))
    if not absorbed:
        y = _call(gm, node, (x, scale, zero), data, w_scale, bias, (1.0, 0, torch.float32, "", torch.float32))
        return _epilogue(gm, node, y)
    out = (1.0, 0, dtype, act, dtype)
    if out_type:
        out = (float(constant(out_scale)), int(constant(out_zero)), torch.uint8, act, torch.uint8)
    return _call(gm, node, (x, scale, zero), data, w_scale, bias, out)


def _call(gm: fx.GraphModule, node: fx.Node, x, data, w_scale, bias, out) -> fx.Node:
    """One onednn.qlinear_pointwise. x: (node, scale, zero); out: (scale, zero, dtype, activation, dtype)."""
    weight = constant(data)
    name = node.meta.get("site", "linear")
    packed = add_constant(gm, f"{name}_packed", made_once("onednn", weight, prepack), node)
    scale = add_constant(gm, f"{name}_scale", constant(w_scale).float().expand(weight.shape[0]).contiguous(), node)
    zero = add_constant(gm, f"{name}_zero", torch.zeros(weight.shape[0], dtype=torch.int32), node)
    if bias is not None and bias.meta["val"].dtype is torch.float64:
        bias = add_call(gm, aten.to.dtype, (bias, torch.float32), node)
    post, algorithm = next((p, a) for act, p, a in POST_OPS if act == out[3])
    args = (*x, packed, scale, zero, bias, out[0], out[1], out[2], post, [], algorithm)
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(onednn.qlinear_pointwise.default, args)
    call.meta = {k: node.meta[k] for k in ("nn_module_stack", "site") if k in node.meta}
    call.meta["val"] = _like(node, weight.shape[0], out[4])
    return call


def _like(node: fx.Node, width: int, dtype: torch.dtype) -> Tensor:
    x = node.args[0].meta["val"]
    with x.fake_mode:
        return torch.empty((*x.shape[:-1], width), dtype=dtype)


def _epilogue(gm: fx.GraphModule, node: fx.Node, y: fx.Node) -> fx.Node:
    """What is left of a fused linear after its float32 product: residual, activation, quantize or cast."""
    other, act, out_scale, out_zero, out_type, dtype = node.args[8:14]
    if other is not None:
        y = add_call(gm, aten.add.Tensor, (y, other), node)
    if act:
        target, options = ACTIVATION_CALLS[act]
        y = add_call(gm, target, (y,), node, **options)
    if out_type:
        return add_call(gm, Q.quantize.default, (y, out_scale, out_zero, out_type), node)
    if dtype is not torch.float32:
        y = add_call(gm, aten.to.dtype, (y, dtype), node)
    return y


def _lower_dynamic(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    (x, x_scale, x_zero, _, data, w_scale, _, bias, *_) = node.args
    weight = constant(data)
    acc = _call(gm, node, (x, 1.0, CENTRE), data, w_scale, None, (1.0, 0, torch.float32, "", torch.float32))
    column = weight.sum(1, dtype=torch.float32) * constant(w_scale).float()
    columns = add_constant(gm, f"{node.meta.get('site', 'linear')}_colsum", column, node)
    shift = add_call(gm, aten.sub.Scalar, (x_zero, CENTRE), node)
    acc = add_call(gm, aten.sub.Tensor, (acc, add_call(gm, aten.mul.Tensor, (shift, columns), node)), node)
    y = add_call(gm, aten.mul.Tensor, (acc, x_scale), node)
    if bias is not None:
        y = add_call(gm, aten.add.Tensor, (y, bias), node)
    return _epilogue(gm, node, y)
