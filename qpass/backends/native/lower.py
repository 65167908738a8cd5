"""Fused linears and attention as the ops of the native kernels.

    qpass.linear(x u8/t | u8/token, w i8, b, other, act, -> f32 | bf16 | u8)     ->   qpass.packed_linear
    qpass.linear(x float, w i8, b, other, act, -> f32 | bf16)                    ->   qpass.weight_only_linear
    aten.scaled_dot_product_attention(q, k, v, mask)  in bfloat16                ->   qpass.attention

The integer sum is exact; scales, zero points and bias become one factor, one offset and one addend a column.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import MASKS, OUT_TYPES
from qpass.backends.native.build import has_attention, library, pack, pack_by_rows, unavailable
from qpass.graphs import add_call, add_constant, constant
from qpass.shared import made_once

Q = torch.ops.qpass
FLOATS = (torch.float32, torch.bfloat16)
LONGEST = 8192  # keys; six rows of scores beyond it leave the L2 cache


def why_not_linear(node: fx.Node) -> str | None:
    """None where the native kernel runs a fused linear that the cpu backend takes, or why oneDNN does."""
    if unavailable() is not None:
        return unavailable()
    bias, other, out_type, dtype = node.args[7], node.args[8], node.args[12], node.args[13]
    if not node.args[3] and (out_type or node.args[0].meta["val"].dtype not in FLOATS):
        return f"the native kernel multiplies float32 and bfloat16 by integer weights, not {node.args[0].meta['val'].dtype}"
    if not out_type and dtype not in OUT_TYPES:
        return f"the native kernel does not write {dtype}"
    if bias is not None and constant(bias) is None:
        return "its bias is computed"
    if other is not None and other.meta["val"].dtype not in FLOATS:
        return f"the native kernel does not add {other.meta['val'].dtype}"
    return None


def lower_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One qpass.packed_linear in front of `node`."""
    (x, x_scale, x_zero, x_type, data, w_scale, _, bias, other, act, out_scale, out_zero, out_type, dtype, _) = (
        node.args
    )
    weight = constant(data)
    n = weight.shape[0]
    if not x_type:
        return _weight_only(gm, node, weight)
    alpha = constant(w_scale).double().expand(n)
    offset = weight.sum(1, dtype=torch.int32)
    rows = (x_scale, x_zero)
    if x_type == "u8/t":
        alpha, offset, rows = alpha * float(constant(x_scale)), offset * int(constant(x_zero)), (None, None)
    beta = torch.zeros(n) if bias is None else constant(bias).detach().float()
    held = {
        "packed": made_once("panels", weight, lambda w: pack(library(), w)),
        "alpha": alpha.float(),
        "beta": beta,
        "offset": offset,
    }
    name = node.meta.get("site", "linear")
    constants = [add_constant(gm, f"{name}_{key}", _own(key, t), node) for key, t in held.items()]
    out = (1.0, 0, dtype)
    if out_type:
        out = (float(constant(out_scale)), int(constant(out_zero)), torch.uint8)
    return add_call(gm, Q.packed_linear.default, (x, *constants, *rows, other, n, act, *out), node)


def _own(key: str, tensor: Tensor) -> Tensor:
    """A constant of a kernel, as no part or view of a tensor of the model."""
    return tensor if key == "packed" else tensor.contiguous().clone()


def _weight_only(gm: fx.GraphModule, node: fx.Node, weight: Tensor) -> fx.Node:
    x, w_scale, bias, other, act, dtype = (node.args[i] for i in (0, 5, 7, 8, 9, 13))
    n = weight.shape[0]
    beta = torch.zeros(n) if bias is None else constant(bias).detach().float()
    held = {
        "packed": made_once("rows", weight, pack_by_rows),
        "alpha": constant(w_scale).float().expand(n),
        "beta": beta,
    }
    name = node.meta.get("site", "linear")
    constants = [add_constant(gm, f"{name}_{key}", _own(key, t), node) for key, t in held.items()]
    return add_call(gm, Q.weight_only_linear.default, (x, *constants, other, n, act, dtype), node)


def why_not_attention(node: fx.Node) -> str | None:
    """None where the native kernel runs an attention, or why not."""
    q, k, v, mask, dropout = node.args[:5]
    values: list[Tensor] = [n.meta["val"] for n in (q, k, v)]
    if not has_attention():
        return unavailable() or "this processor lacks avx512_bf16"
    if dropout or (node.kwargs.get("scale") or 1) <= 0:
        return "dropout and scales below zero are left to torch's kernel"
    if any(x.dtype is not torch.bfloat16 or x.dim() != 4 for x in values):
        return "the native kernel runs bfloat16 attention of [batch, heads, length, width]"
    if not all(isinstance(x.shape[axis], int) for x in values for axis in (1, 3)):
        return "heads or width are not known"
    if values[0].shape[3] % 2 or values[0].shape[1] % values[1].shape[1]:
        return "an odd width, or query heads that are no multiple of the key heads"
    if str(values[0].shape[0]) != str(values[1].shape[0]):
        return "queries and keys have different batches"
    if mask is not None and (mask.meta["val"].dim() != 4 or mask.meta["val"].dtype not in MASKS):
        return "the mask is not bool, float32 or bfloat16 of [batch, heads, length, length]"
    keys = values[1].shape[2]
    hint = keys if isinstance(keys, int) else keys.node.hint
    return f"{hint} keys are more than {LONGEST}" if hint is not None and hint > LONGEST else None


def lower_attention(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One qpass.attention in front of `node`."""
    q, k, v, mask, _, causal = node.args[:6]
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(q.meta["val"].shape[3])
    return add_call(gm, Q.attention.default, (q, k, v, mask, bool(causal), float(scale), None, None), node)
