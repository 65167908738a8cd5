"""Quantizes of rows as one kernel with what makes their value: a norm, an activation, a gate.

    choose_qparams, quantize(affine(x), u8/token)                        ->   quantize_rows(x)
    quantize(affine(norm(x)))                                            ->   norm_quantize(x)
    quantize(affine(act(a))), quantize(affine(act(a) * b))               ->   act_quantize(a, b)

`affine` is the plan's factor and shift of an input (qpass/backends/quantized_input.py). With a static scale a plain quantize
is left to the generated kernels, which join it to any pointwise work in front. Codes come as int8 (codes.py).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.quantized_input import Affine, affine_of
from qpass.backends.triton.codes import HALF, static_zero, unsigned
from qpass.backends.triton.norms import Norm, norm_of
from qpass.backends.triton.package import too_old
from qpass.graphs import add_call, add_constant, constant

aten = torch.ops.aten
Q = torch.ops.qpass
TYPES = {"u8/t": torch.int8, "u8/token": torch.int8, "e4m3/t": torch.float8_e4m3fn, "e4m3/token": torch.float8_e4m3fn}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTS = {
    aten.relu.default: "relu", aten.silu.default: "silu", aten.sigmoid.default: "sigmoid",
    aten.hardswish.default: "hardswish", aten.relu6.default: "relu6",
}  # fmt: skip


@dataclass(frozen=True)
class Gated:
    """act(x) * gate, or act(x)."""

    x: fx.Node
    gate: fx.Node | None
    act: str


def absorb(gm: fx.GraphModule) -> int:
    """Makes kernels of the quantizes of rows; returns their number."""
    edits = 0
    for node in list(gm.graph.nodes):
        if node.target is Q.quantize.default and why_not(node) is None:
            node.replace_all_uses_with(_kernel(gm, node))
            edits += 1
    gm.graph.eliminate_dead_code()
    return edits


def why_not(node: fx.Node) -> str | None:
    """None where a kernel quantizes, or why a generated one does."""
    qtype, x = node.args[3], node.args[0].meta["val"]
    if qtype not in TYPES or x.dtype not in FLOATS or not isinstance(x.shape[-1], int):
        return f"the triton kernels quantize rows of floats to {', '.join(TYPES)}, not {x.dtype} to {qtype}"
    if qtype.endswith("/token"):
        return too_old(x.device, qtype.startswith("e4m3")) or (
            None if _chosen(node) is not None else "its scale is not that of its own rows"
        )
    found = _affine(node)
    if constant(node.args[1]) is None:
        return "its scale is computed"
    if found is None or (_norm(found) is None and _gated(found) is None):
        return "a generated kernel joins it to the work in front"
    return too_old(x.device, qtype.startswith("e4m3"))


def _chosen(node: fx.Node) -> fx.Node | None:
    """The choose_qparams behind the scale of a quantize, where it is that of the same rows."""
    scale = node.args[1]
    if not isinstance(scale, fx.Node) or scale.target is not operator.getitem:
        return None
    chosen = scale.args[0]
    return chosen if chosen.target is Q.choose_qparams.default and chosen.args == (node.args[0], node.args[3]) else None


def _affine(node: fx.Node) -> Affine | None:
    return affine_of(node)


def _norm(found: Affine) -> Norm | None:
    return norm_of(found.source)


def _gated(found: Affine) -> Gated | None:
    """The activation or product behind an affine, where nobody else reads it."""
    value = found.source
    if set(value.users) - set(found.readers):
        return None
    if value.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in value.args[:2]):
        a, b = value.args[:2]
        if not _same(a, b):
            return None
        for x, gate in ((a, b), (b, a)):
            act = _act(x)
            if act and len(x.users) == 1 and x.meta["val"].dtype == gate.meta["val"].dtype:
                return Gated(x.args[0], gate, act)
        return Gated(a, b, "") if a.meta["val"].dtype == b.meta["val"].dtype else None
    act = _act(value)
    return Gated(value.args[0], None, act) if act else None


def _same(a: fx.Node, b: fx.Node) -> bool:
    return all(isinstance(n.meta.get("val"), Tensor) for n in (a, b)) and str(a.meta["val"].shape) == str(
        b.meta["val"].shape
    )


def _act(node: fx.Node) -> str:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return ACTS.get(node.target, "")


def _kernel(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The codes of a quantize as the graph has them, from a kernel; other readers get what they read from it too."""
    found, qtype = _affine(node), node.args[3]
    norm = None if found is None else _norm(found)
    gated = None if found is None or norm is not None else _gated(found)
    dtype, static = TYPES[qtype], qtype.endswith("/t")
    symmetric = dtype is not torch.int8
    scale, zero = None, 0
    if static:
        scale, zero = float(constant(node.args[1])), 0 if symmetric else static_zero(node.args[2])
    K = torch.ops.qpass_kernels
    if norm is not None:
        keep = any(user not in found.readers for user in found.source.users)
        args = (norm.x, None, norm.weight, norm.bias, norm.eps, norm.rms, *_vectors(gm, node, found))
        parts = _call(gm, node, K.norm_quantize.default, (*args, scale, zero, dtype, symmetric, keep), 5)
        if keep:
            found.source.replace_all_uses_with(parts[1], delete_user_cb=lambda user: user not in found.readers)
        parts = parts[2:]
    elif gated is not None:
        args = (gated.x, gated.gate, gated.act, *_vectors(gm, node, found))
        parts = _call(gm, node, K.act_quantize.default, (*args, scale, zero, dtype, symmetric), 3)
    elif found is not None:
        args = (found.source, *_vectors(gm, node, found), dtype, symmetric)
        parts = _call(gm, node, K.quantize_rows.default, args, 3)
    else:
        parts = _call(gm, node, K.quantize_rows.default, (node.args[0], None, None, dtype, symmetric), 3)
    if not static:
        _give_parameters(gm, node, parts[1], parts[2])
    return parts[0] if symmetric else unsigned(gm, parts[0], node)


def _call(gm: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...], count: int) -> list[fx.Node]:
    """The results of an op in front of all that reads what it replaces."""
    before = _chosen(node) or node
    made = add_call(gm, target, args, before)
    made.meta["site"] = node.meta.get("site", "")
    return [add_call(gm, operator.getitem, (made, i), before) for i in range(count)]


def _give_parameters(gm: fx.GraphModule, node: fx.Node, scale: fx.Node, zero: fx.Node) -> None:
    """The readers of the scale and zero point that were chosen get the kernel's; zero points as of uint8 codes."""
    chosen = _chosen(node)
    assert chosen is not None
    if node.args[3].startswith("u8"):
        zero = add_call(gm, aten.add.Scalar, (zero, HALF), chosen)
    for user in list(chosen.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with((scale, zero)[user.args[1]], delete_user_cb=lambda other: other is not node)


def _vectors(gm: fx.GraphModule, node: fx.Node, found: Affine) -> list[fx.Node | None]:
    """Mul and add of the affine as constants, or None."""
    before, name = _chosen(node) or node, node.meta.get("site", "quantize")
    values = (("mul", found.mul), ("add", None if found.shift is None else -found.shift))
    return [None if t is None else add_constant(gm, f"{name}_{key}", t.contiguous(), before) for key, t in values]
