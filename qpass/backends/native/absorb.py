"""Quantize where the value is made: a quantize right behind attention or a norm becomes part of their kernel.

    quantize(affine(reshape(transpose(attention(q, k, v)))))   ->   reshape(transpose(attention(q, k, v, mul, add)))
    quantize(affine(layer_norm(x)))                            ->   norm_quantize(x, ..., mul, add)

`affine` is the shift and factor that a plan moves onto an input: x * mul, x - shift, in this order, each or neither; a scale
and zero point are folded into the same two vectors. Other readers of the norm get it from the same kernel.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from qpass.backends.native.build import has_attention, unavailable
from qpass.backends.quantized_input import Affine, affine_of
from qpass.graphs import add_call, add_constant, constant, single_user

aten = torch.ops.aten
Q = torch.ops.qpass
NORMS = {aten.layer_norm.default: False, aten.rms_norm.default: True}


def why_not(node: fx.Node) -> str | None:
    """None where a quantize can be part of the kernel in front of it, or why not."""
    if unavailable() is not None:
        return unavailable()
    found = affine_of(node)
    if found is None:
        return "its input has other readers, or parameters that are computed"
    if node.args[3] == "u8/t" and has_attention() and _attention(found.source) is not None:
        return None
    if node.args[3] not in ("u8/t", "u8/token") or found.source.target not in NORMS:
        return "what makes its input is no native kernel"
    return _norm_refuses(node, found.source)


def absorb(gm: fx.GraphModule) -> int:
    """Makes each quantize that can be part of the kernel in front of it; returns their number."""
    edits = 0
    for node in list(gm.graph.nodes):
        if node.target is Q.quantize.default and why_not(node) is None:
            node.replace_all_uses_with(_absorbed(gm, node))
            edits += 1
    gm.graph.eliminate_dead_code()
    return edits


def _absorbed(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The codes of a quantize, from the kernel in front of it."""
    found = affine_of(node)
    assert found is not None
    return _norm(gm, node, found) if found.source.target in NORMS else _quantized_attention(gm, node, found)


def _vectors(gm: fx.GraphModule, node: fx.Node, found: Affine, width: int, before: fx.Node) -> list[fx.Node]:
    """Mul and add: the affine, and the scale and zero point of a static quantize, as two constants."""
    mul = torch.ones(width, dtype=torch.float64) if found.mul is None else found.mul.double()
    add = torch.zeros(width, dtype=torch.float64) if found.shift is None else -found.shift.double()
    if node.args[3] == "u8/t":
        scale, zero = float(constant(node.args[1])), int(constant(node.args[2]))
        mul, add = mul / scale, add / scale + zero
    name = node.meta.get("site", "quantize")
    return [add_constant(gm, f"{name}_{key}", t.float(), before) for key, t in (("mul", mul), ("add", add))]


def _attention(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """(attention, the views and casts from it to `node`), where nobody else reads them."""
    path: list[fx.Node] = []
    steps = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.transpose.int, aten.to.dtype)
    while node.target in (*steps, aten.clone.default, aten.contiguous.default):
        path.append(node)
        node = node.args[0]
        if single_user(node) is not path[-1]:
            return None
    turned = any(n.target is aten.transpose.int and {a % 4 for a in n.args[1:3]} == {1, 2} for n in path)
    whole = bool(path) and len(path[0].meta["val"].shape) == 3 and turned
    unquantized = node.target is Q.attention.default and node.args[6] is None
    return (node, path[::-1]) if unquantized and whole and _is_merge(node, path[0]) else None


def _is_merge(attention: fx.Node, last: fx.Node) -> bool:
    """[batch, heads, length, width] came back as [batch, length, heads * width]."""
    batch, heads, length, width = attention.meta["val"].shape
    found = last.meta["val"].shape
    return str(tuple(found)) == str((batch, length, heads * width))


def _quantized_attention(gm: fx.GraphModule, node: fx.Node, found: Affine) -> fx.Node:
    behind = _attention(found.source)
    assert behind is not None
    attention, path = behind
    mul, add = _vectors(gm, node, found, int(path[-1].meta["val"].shape[-1]), attention)
    codes = add_call(gm, Q.attention.default, (*attention.args[:6], mul, add), attention)
    for step in path:
        if step.target is not aten.to.dtype:
            codes = add_call(gm, step.target, (codes, *step.args[1:]), node, **step.kwargs)
    return codes


def _norm_refuses(node: fx.Node, norm: fx.Node) -> str | None:
    x = norm.args[0].meta["val"]
    if x.dtype is not torch.float32 or norm.meta["val"].dtype is not torch.float32:
        return f"the norm is computed in {x.dtype}"
    if len(norm.args[1]) != 1 or not isinstance(x.shape[-1], int):
        return "the norm is over several axes"
    weights = norm.args[2:3] if NORMS[norm.target] else norm.args[2:4]
    if any(w is not None and constant(w) is None for w in weights):
        return "the norm's weight is computed"
    chosen = node.args[1].args[0] if node.args[3] == "u8/token" and node.args[1].target is operator.getitem else None
    if node.args[3] == "u8/token" and getattr(chosen, "target", None) is not Q.choose_qparams.default:
        return "its scale is not that of its own rows"
    return None


def _norm(gm: fx.GraphModule, node: fx.Node, found: Affine) -> fx.Node:
    norm, rms = found.source, NORMS[found.source.target]
    dynamic = node.args[3] == "u8/token"
    mul, add = _vectors(gm, node, found, int(norm.meta["val"].shape[-1]), norm)
    weight, bias, eps = (norm.args[2], None, norm.args[3]) if rms else norm.args[2:5]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    keep = any(user not in found.readers for user in norm.users)
    args = (norm.args[0], weight, bias, float(eps), rms, mul, add, dynamic, keep)
    both = add_call(gm, Q.norm_quantize.default, args, norm)
    both.meta["site"] = node.meta.get("site", "")
    parts = [add_call(gm, operator.getitem, (both, i), norm) for i in range(4)]
    if dynamic:
        for user in list(node.args[1].args[0].users):
            user.replace_all_uses_with(parts[2 + user.args[1]])
    if keep:
        norm.replace_all_uses_with(parts[0])
    return parts[1]
