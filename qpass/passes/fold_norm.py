"""Fold batch norm at inference into what stands in front of it.

    batch_norm(y) = y * m + a,    m = gamma / sqrt(var + eps),  a = beta - mean * m      (Ioffe & Szegedy 2015, algorithm 2)

    1. batch_norm(convolution(x, dequantize(w, s), b))  ->  convolution(x, dequantize(w, s * m), b * m + a)   and a linear's
    2. batch_norm(convolution(x, w, b))                 ->  convolution(x, w * m, b * m + a)                    w float
    3. batch_norm(y)                                    ->  y * m + a                                           elsewhere

The integers do not change (rows with m < 0 change their sign), so this is exact: a scale per output channel is a factor per
output channel. All is computed in float64 and rounded once.

1. the norm uses its running statistics, and these and its weights are constants;
2. for 1 and 2 the convolution has no other reader; a transposed one has one group;
3. for 3 the dtype is float32 or float64: half types keep torch's own norm, which rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.convolutions import is_convolution
from qpass.graphs import add_call, add_constant, constant, single_user

aten = torch.ops.aten
Q = torch.ops.qpass
NORM = aten.batch_norm.default


def fold_norm(gm: fx.GraphModule, context=None) -> int:
    """Folds every batch norm that can be; returns their number."""
    edits = 0
    for node in list(gm.graph.nodes):
        if node.target is NORM and (affine := norm_affine(node)) is not None:
            edits += _into_product(gm, node, *affine) or _as_affine(gm, node, *affine)
    gm.graph.eliminate_dead_code()
    return edits


def norm_affine(node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(m, a), float64 [C], of a batch norm at inference; None where its statistics are those of the batch."""
    _, weight, bias, mean, var, training, _, eps, _ = node.args
    held = [None if n is None else constant(n) for n in (weight, bias, mean, var)]
    if (
        training
        or held[2] is None
        or held[3] is None
        or any(n is not None and h is None for n, h in zip((weight, bias), held, strict=False))
    ):
        return None
    gamma, beta, centre, variance = (None if h is None else h.detach().double() for h in held)
    assert centre is not None
    assert variance is not None
    mul = torch.rsqrt(variance + eps) if gamma is None else gamma / torch.sqrt(variance + eps)
    add = -centre * mul
    return mul, add if beta is None else add + beta


def _into_product(gm: fx.GraphModule, node: fx.Node, mul: Tensor, add: Tensor) -> int:
    maker = node.args[0]
    product = is_convolution(maker) or (maker.target is aten.linear.default and maker.meta["val"].dim() == 2)
    if not product or single_user(maker) is not node:
        return 0
    bias = constant(maker.args[2])
    turned = is_convolution(maker) and bool(maker.args[6])
    if (maker.args[2] is not None and bias is None) or (turned and maker.args[8] != 1):
        return 0
    weight = scaled_weight(gm, maker, mul, 1 if turned else 0)
    if weight is None:
        return 0
    name = maker.meta.get("site", "norm")
    shift = add if bias is None else bias.detach().double() * mul + add
    maker.update_arg(1, weight)
    maker.update_arg(2, add_constant(gm, f"{name}_bias", shift.to(maker.meta["val"].dtype), maker))
    node.replace_all_uses_with(maker)
    gm.graph.erase_node(node)
    return 1


def scaled_weight(gm: fx.GraphModule, maker: fx.Node, mul: Tensor, axis: int) -> fx.Node | None:
    """The weight of a product with its output channels times `mul`; None where it is neither constant nor packed."""
    weight, name = maker.args[1], maker.meta.get("site", "norm")
    float_weight = constant(weight)
    if float_weight is not None:
        shaped = mul.reshape([-1 if i == axis else 1 for i in range(float_weight.dim())])
        folded = (float_weight.detach().double() * shaped).to(float_weight.dtype)
        return add_constant(gm, f"{name}_folded", folded, maker)
    if getattr(weight, "target", None) is not Q.dequantize.default or not weight.args[3].endswith(f"/c{axis}"):
        return None
    data, scale = (constant(n) for n in weight.args[:2])
    if data is None or scale is None or weight.args[2] is not None:
        return None  # with a zero point, minus a code is no code
    signs = torch.where(mul < 0, -1, 1).to(torch.int8)
    held = weight.args[0]
    if bool((mul < 0).any()):
        held = add_constant(
            gm, f"{name}_signed", data * signs.reshape([-1 if i == axis else 1 for i in range(data.dim())]), maker
        )
    folded = add_constant(gm, f"{name}_scale", (scale.double() * mul.abs()).float(), maker)
    return add_call(gm, Q.dequantize.default, (held, folded, *weight.args[2:]), maker)


def _as_affine(gm: fx.GraphModule, node: fx.Node, mul: Tensor, add: Tensor) -> int:
    x, value = node.args[0], node.meta["val"]
    if value.dtype not in (torch.float32, torch.float64):
        return 0
    shape = [-1, *[1] * (value.dim() - 2)]
    held = [
        add_constant(gm, f"norm_{key}", t.to(value.dtype).reshape(shape), node)
        for key, t in (("mul", mul), ("add", add))
    ]
    y = add_call(gm, aten.add.Tensor, (add_call(gm, aten.mul.Tensor, (x, held[0]), node), held[1]), node)
    node.replace_all_uses_with(y)
    gm.graph.erase_node(node)
    return 1
