"""Fused linears as the ops of qpass_kernels.

    x u8/t | u8/token, w of 5 to 8 bits, one scale a row          ->   w8a8_linear
    x u8/t | u8/token, w of 2 to 4 bits, a scale a row or group   ->   w4a8_linear
    x e4m3/t | e4m3/token, w e4m3/c0                              ->   w8a8_linear
    x float, w of 5 to 8 bits, one scale a row                    ->   w8a16_linear
    x float, w of 2 to 4 bits, with zero points or without        ->   w4a16_linear

Weights are packed once, here (qpass_kernels/layouts.py). Scales, zero points and bias become alpha, beta and offset of
qpass_kernels/epilogue.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qpass import affine
from qpass.backends.triton.codes import signed, signed_zero, static_zero, unsigned
from qpass.backends.triton.package import kernels, too_old
from qpass.graphs import add_call, add_constant, constant
from qpass.qtype import QType

aten = torch.ops.aten

FLOATS = (torch.bfloat16, torch.float16)
OUTPUTS = (torch.float32, *FLOATS)
LARGEST_K = (2**31 - 1) // (128 * 128)
ZERO = 8  # of unsigned 4-bit codes of a symmetric weight


@dataclass(frozen=True)
class Packed:
    """The weight of an op. held: its constants in order, or None; alpha: float32 [N]; sums: of its integers, by row."""

    op: str
    held: tuple[Tensor | None, ...]
    alpha: Tensor
    sums: Tensor | None = None


def why_not(node: fx.Node) -> str | None:
    """None where a kernel runs a fused linear, or the sentence that says why not."""
    x, x_type, weight_type = node.args[0].meta["val"], node.args[3], QType.parse(node.args[6])
    if any(constant(node.args[i]) is None for i in (4, 5)):
        return "its weight is not a constant of the graph"
    return (
        too_old(x.device, weight_type.is_float)
        or (_why_not_float(node, x, weight_type) if not x_type else _why_not_codes(node, x_type, weight_type))
        or _why_not_output(node)
    )


def _why_not_float(node: fx.Node, x: Tensor, weight_type: QType) -> str | None:
    if x.dtype not in FLOATS:
        return f"the triton kernels multiply bfloat16 and float16 by packed weights, not {x.dtype}"
    if weight_type.is_float:
        return f"the triton kernels multiply float inputs by integer weights, not {weight_type}"
    kind = "w4a16" if weight_type.bits <= 4 else "w8a16"
    if kind == "w8a16" and node.args[14] is not None:
        return "the triton kernels take zero points of weights of up to 4 bits"
    return _why_not_groups(node, kind, weight_type)


def _why_not_codes(node: fx.Node, x_type: str, weight_type: QType) -> str | None:
    if x_type not in ("u8/t", "u8/token", "e4m3/t", "e4m3/token"):
        return f"the triton kernels multiply inputs of u8/t, u8/token, e4m3/t or e4m3/token, not {x_type}"
    if weight_type.is_float != x_type.startswith("e4m3"):
        return f"the triton kernels multiply integers by integers and floats by floats, not {x_type} by {weight_type}"
    if node.args[14] is not None:
        return "weights with zero points are multiplied in float"
    k = constant(node.args[4]).shape[1]
    if not weight_type.is_float and k > LARGEST_K:
        return f"its {k} inputs could overflow the int32 accumulator (at most {LARGEST_K})"
    return _why_not_groups(node, "w4a8" if weight_type.bits <= 4 else "w8a8", weight_type)


def _why_not_groups(node: fx.Node, kind: str, weight_type: QType) -> str | None:
    if weight_type.granularity in ("channel", "tensor") and weight_type.axis in (0, None):
        return None
    if weight_type.group is None or kind in ("w8a8", "w8a16"):
        return f"the triton kernels take weights of {weight_type.bits} bits with a scale for each output, not {weight_type}"
    return kernels().layouts.why_no_group(kind, weight_type.group, constant(node.args[4]).shape[1])


def _why_not_output(node: fx.Node) -> str | None:
    other, out_type, dtype = node.args[8], node.args[12], node.args[13]
    if out_type not in ("", "u8/t", "e4m3/t"):
        return f"the triton kernels write u8/t, e4m3/t or floats, not {out_type}"
    if out_type and constant(node.args[10]) is None:
        return "the scale of its output is computed"
    if not out_type and dtype not in OUTPUTS:
        return f"the triton kernels write float32, bfloat16 and float16, not {dtype}"
    if other is not None and other.meta["val"].dtype not in OUTPUTS:
        return f"the triton kernels do not add {other.meta['val'].dtype}"
    return None


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One op in front of `node`, and what turns codes; returns the last."""
    x, x_scale, x_zero, x_type, bias, other, act = (node.args[i] for i in (0, 1, 2, 3, 7, 8, 9))
    packed = _packed(node)
    alpha, offset, rows = packed.alpha, None, (None, None)
    if x_type.endswith("/t"):
        alpha = alpha * constant(x_scale).float()
    elif x_type:
        rows = (x_scale, signed_zero(gm, x_zero, node) if x_type.startswith("u8") else None)
    if x_type.startswith("u8"):
        x = signed(gm, x, node)
        offset = packed.sums * (static_zero(x_zero) if x_type == "u8/t" else 1)
    name = node.meta.get("site", "linear")
    hold = lambda key, t: None if t is None else add_constant(gm, f"{name}_{key}", t.contiguous(), node)  # noqa: E731
    weights = [hold(key, t) for key, t in zip(("packed", "scale", "zero"), packed.held, strict=False)]
    after = (hold("alpha", alpha.float()), _beta(gm, node, bias), hold("offset", offset), *rows, other, act)
    target = getattr(torch.ops.qpass_kernels, packed.op).default
    made = add_call(gm, target, (x, *weights, *after, *_output(node)), node)
    return unsigned(gm, made, node) if node.args[12] == "u8/t" else made


def _output(node: fx.Node) -> tuple[float, int, torch.dtype]:
    """out_scale, out_zero and out_dtype of the op."""
    scale, zero, out_type, dtype = node.args[10:14]
    if out_type == "u8/t":
        return float(constant(scale)), static_zero(zero), torch.int8
    return (float(constant(scale)), 0, torch.float8_e4m3fn) if out_type else (1.0, 0, dtype)


def _beta(gm: fx.GraphModule, node: fx.Node, bias: fx.Node | None) -> fx.Node | None:
    held = constant(bias)
    if held is not None:
        return add_constant(gm, f"{node.meta.get('site', 'linear')}_beta", held.detach().float().contiguous(), node)
    return None if bias is None else add_call(gm, aten.to.dtype, (bias, torch.float32), node)


def _packed(node: fx.Node) -> Packed:
    """The weight of a fused linear as its op holds it."""
    data, scale, zero = (constant(node.args[i]) for i in (4, 5, 14))
    weight_type, codes = QType.parse(node.args[6]), bool(node.args[3])
    by_row = scale.detach().float()
    if weight_type.group is None:
        by_row = by_row.expand(data.shape[0])
    if codes and (weight_type.is_float or weight_type.bits > 4):
        sums = None if weight_type.is_float else data.sum(1, dtype=torch.int32)
        return Packed("w8a8_linear", (data,), by_row, sums)
    if codes:
        return _four_bit_codes(data, by_row, weight_type)
    layouts = kernels().layouts
    if weight_type.bits > 4:
        return Packed("w8a16_linear", (layouts.pack(data, "w8a16"),), by_row)
    unsigned_codes = data if not weight_type.signed else data + ZERO
    group_scale, alpha = layouts.group_scales(by_row) if weight_type.group else (None, by_row)
    if zero is None:
        zero = torch.full((data.shape[0], 1 if group_scale is None else len(group_scale)), ZERO)
    held_zero = zero.reshape(data.shape[0], -1).t().to(torch.uint8)
    return Packed("w4a16_linear", (layouts.pack(unsigned_codes, "w4a16"), group_scale, held_zero), alpha)


def _four_bit_codes(data: Tensor, scale: Tensor, weight_type: QType) -> Packed:
    """Codes in the upper halves of bytes: 16 times themselves, which alpha takes back and the sums have too."""
    layouts = kernels().layouts
    words = layouts.pack(data, "w4a8", layouts.block_of("w4a8", weight_type.group or 0))
    if not weight_type.group:
        return Packed("w4a8_linear", (words, None), scale / 16, 16 * data.sum(1, dtype=torch.int32))
    group_scale, alpha = layouts.group_scales(scale)
    used = affine.dequantize(data, group_scale.t().float(), None, weight_type, torch.float64)
    return Packed("w4a8_linear", (words, group_scale), alpha / 16, (16 * used.sum(1)).float())
