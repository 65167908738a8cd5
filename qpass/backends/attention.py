"""Attention on the cpu backend: two batched matmuls and a generated softmax instead of torch's flash kernel.

    attention(q, k, v, mask)   ->   s = bmm(q, k^T)
                                    e = bf16(exp(s * scale + mask - max)), t = sum(e)   one generated kernel
                                    bmm(e, v) / t                                       divided where it is read

torch's CPU flash kernel cuts a head of 32 to 128 columns into blocks too small for its matmul: at 32 x 12 x 128 x 32 it
takes 10.6 ms where the two products take 2.2 and the exponential one pass. It wins once the scores no longer fit the cache,
so long sequences keep it. bfloat16 only: in float32 the products themselves cost as much as the flash kernel.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx

from qpass.graphs import add_call

aten = torch.ops.aten
LONGEST = 1024  # keys; beyond it a row block of scores leaves the cache
LOWEST = torch.finfo(torch.float32).min


def why_not(node: fx.Node) -> str | None:
    """None where attention is better as two products, or why torch's kernel stays."""
    q, k, v, mask, dropout, causal = node.args[:6]
    values = [n.meta["val"] for n in (q, k, v)]
    if any(x.dtype is not torch.bfloat16 or x.dim() != 4 for x in values):
        return "only bfloat16 attention of [batch, heads, length, width] is cut into products"
    if dropout or causal or node.kwargs.get("enable_gqa"):
        return "dropout, causal masks and grouped heads are left to torch's kernel"
    if str(values[0].shape[1]) != str(values[1].shape[1]) or str(values[0].shape[0]) != str(values[1].shape[0]):
        return "query and key have different heads"
    if mask is not None and mask.meta["val"].dim() != 4:
        return "the mask is not [batch, heads, length, length]"
    keys = values[1].shape[2]
    hint = keys if isinstance(keys, int) else keys.node.hint
    if hint is not None and hint > LONGEST:
        return f"{hint} keys are more than {LONGEST}: torch's blocked kernel is faster"
    return None


def lower_attention(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The products and the softmax in front of `node`; returns the last node."""
    q, k, v, mask = node.args[:4]
    heads = q.meta["val"].shape[1]
    batch, length, width = (_size(gm, q, axis, node) for axis in (0, 2, 3))
    keys, out = _size(gm, k, 2, node), _size(gm, v, 3, node)
    flat = _product(gm, batch, heads, node)
    call = lambda target, *args, **kw: add_call(gm, target, args, node, **kw)  # noqa: E731
    rows = [
        call(aten.reshape.default, x, [flat, n, w])
        for x, n, w in ((q, length, width), (k, keys, width), (v, keys, out))
    ]
    scores = call(aten.bmm.default, rows[0], call(aten.transpose.int, rows[1], 1, 2))
    scores = call(aten.view.default, scores, [batch, heads, length, keys])
    scores = call(aten.to.dtype, scores, torch.float32)
    scale = node.kwargs.get("scale")
    scores = call(aten.mul.Tensor, scores, 1 / math.sqrt(int(q.meta["val"].shape[3])) if scale is None else scale)
    if mask is not None:
        scores = _masked(call, scores, mask)
    top = call(aten.amax.default, scores, [-1], True)
    weight = call(aten.to.dtype, call(aten.exp.default, call(aten.sub.Tensor, scores, top)), torch.bfloat16)
    total = call(aten.sum.dim_IntList, call(aten.to.dtype, weight, torch.float32), [-1], True)
    mixed = call(aten.bmm.default, call(aten.reshape.default, weight, [flat, length, keys]), rows[2])
    mixed = call(aten.to.dtype, call(aten.view.default, mixed, [batch, heads, length, out]), torch.float32)
    return call(aten.to.dtype, call(aten.div.Tensor, mixed, total), torch.bfloat16)


def _masked(call, scores: fx.Node, mask: fx.Node) -> fx.Node:
    if mask.meta["val"].dtype is torch.bool:
        return call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, mask), LOWEST)
    return call(aten.add.Tensor, scores, call(aten.to.dtype, mask, torch.float32))


def _size(gm: fx.GraphModule, node: fx.Node, axis: int, before: fx.Node):
    """A size of a value: a number, or the node that computes it."""
    value: Tensor = node.meta["val"]
    size = value.shape[axis]
    return size if isinstance(size, int) else add_call(gm, aten.sym_size.int, (node, axis), before)


def _product(gm: fx.GraphModule, batch, heads: int, before: fx.Node):
    return batch * heads if isinstance(batch, int) else add_call(gm, operator.mul, (batch, heads), before)
