"""Fused convolutions and pools of integers as the ops of the native kernels.

    qpass.conv(x u8, w int8, b, other u8 | float, act, -> f32 | bf16 | u8)   ->   qpass.packed_conv
    qpass.conv(qpass.pad(x u8, widths, zero), ...)                           ->   qpass.packed_conv, of another padding
    qpass.max_pool(x u8)                                                     ->   qpass.packed_max_pool

Scales, zero points and bias become one factor, one addend and one offset an output channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import OUT_TYPES
from qpass.backends.native.build import unavailable
from qpass.backends.native.conv_pack import pack_conv, phase_offsets, plain_weight
from qpass.conv_ops import channel_scales
from qpass.convolutions import Geometry
from qpass.graphs import add_call, add_constant, constant, pads_zeros, set_value, single_user
from qpass.qtype import QType

Q = torch.ops.qpass


def walk_of(node: fx.Node) -> Geometry:
    """The geometry of a qpass.conv."""
    stride, padding, dilation, transposed, output_padding, groups = node.args[18:]
    kernel = node.args[4].meta["val"].shape[2:]
    return Geometry(
        *map(tuple, (kernel, stride, padding, dilation)), bool(transposed), tuple(output_padding), int(groups)
    )


def why_not_conv(node: fx.Node) -> str | None:
    """None where the native kernel runs a fused convolution, or why not."""
    if unavailable() is not None:
        return unavailable()
    x_type, other, other_type, out_type, dtype = (node.args[i] for i in (3, 8, 11, 16, 17))
    if not x_type.startswith("u") or (x_type.endswith("/t") and constant(node.args[1]) is None):
        return f"the native kernel reads unsigned integers with a constant scale or one a sample, not {x_type}"
    if any(constant(node.args[i]) is None for i in (4, 5)):
        return "its weight is not a constant of the graph"
    if any(node.args[i] is not None and constant(node.args[i]) is None for i in (7, 13)):
        return "its bias or slope is computed"
    if not out_type and dtype not in OUT_TYPES:
        return f"the native kernel does not write {dtype}"
    if out_type and not (out_type.startswith("u") and out_type.endswith("/t")):
        return f"the native kernel writes unsigned integers per tensor, not {out_type}"
    if other_type and not other_type.startswith("u"):
        return f"the native kernel adds unsigned integers, not {other_type}"
    if other is not None and not other_type and other.meta["val"].dtype not in (torch.float32, torch.bfloat16):
        return f"the native kernel does not add {other.meta['val'].dtype}"
    return None


def lower_conv(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One qpass.packed_conv in front of `node`."""
    (x, x_scale, x_zero, x_type, data, w_scale, _, bias, other, other_scale, other_zero, other_type, act, slope, out_scale,
     out_zero, out_type, dtype) = node.args[:18]  # fmt: skip
    g, weight = walk_of(node), _held(data)
    plain = plain_weight(weight, g)
    n = plain.shape[0]
    alpha = channel_scales(_held(w_scale), n).double()
    offset, zero, sample = phase_offsets(plain, g), 0, (x_scale, x_zero)
    if x_type.endswith("/t"):
        zero, sample = int(_held(x_zero)), (None, None)
        alpha, offset = alpha * float(_held(x_scale)), offset * zero
    beta = torch.zeros(n) if bias is None else _held(bias).detach().float()
    held = {"packed": pack_conv(weight, g), "alpha": alpha.float(), "beta": beta, "offset": offset}
    name = node.meta.get("site", "conv")
    constants = [add_constant(gm, f"{name}_{key}", t.contiguous().clone(), node) for key, t in held.items()]
    if slope is not None:
        values = _held(slope).detach().float().flatten().expand(n).contiguous()
        slope = add_constant(gm, f"{name}_slope", values, node)
    added = (float(_held(other_scale)), int(_held(other_zero))) if other_type else (1.0, 0)
    out = (1.0, 0, 255, dtype)
    if out_type:
        out = (float(_held(out_scale)), int(_held(out_zero)), QType.parse(out_type).qmax, torch.uint8)
    x, padding = _padded(gm, x, node, g, zero)
    walk = (list(g.kernel), node.args[18], padding, *node.args[20:])
    args = (x, *constants, slope, *sample, other, *added, n, *walk, zero, act, *out)
    return add_call(gm, Q.packed_conv.default, args, node)


def _padded(gm: fx.GraphModule, x: fx.Node, node: fx.Node, g: Geometry, zero: int) -> tuple[fx.Node, list[int]]:
    """What the kernel reads, and its padding: zero points around an image are rows that the kernel makes up itself."""
    kind: Any = node.args[3]
    source: Any = x.args[0] if x.args else None
    amounts: Any = ()
    if kind.endswith("/t"):
        if x.target is Q.pad.default and x.args[2] == zero:
            amounts = x.args[1]
    elif x.target is Q.quantize.default and pads_zeros(source) and single_user(x) is node:
        amounts = source.args[1]
    widths = [*amounts, *[0] * (2 * g.axes - len(amounts))]
    known = all(isinstance(width, int) and width >= 0 for width in widths)
    if not amounts or g.transposed or len(widths) > 2 * g.axes or not known:
        return x, list(g.padding)
    inner = source if x.target is Q.pad.default else _before_pad(gm, x, node)
    before, after = widths[-2::-2], widths[::-2]  # of the outer axes first
    return inner, [p + width for side in (before, after) for p, width in zip(g.padding, side, strict=True)]


def _before_pad(gm: fx.GraphModule, quantize: fx.Node, node: fx.Node) -> fx.Node:
    """The codes of what a quantize reads padded, of the scales it has: a range always holds 0, so zeros change none."""
    pad: Any = quantize.args[0]
    for user in list(pad.users):
        if user.target is Q.choose_qparams.default:
            user.update_arg(0, pad.args[0])
            set_value(gm, user)
    return add_call(gm, Q.quantize.default, (pad.args[0], *quantize.args[1:]), node)


def why_not_max_pool(node: fx.Node) -> str | None:
    """None where the native kernel runs a pool of integers, or why not."""
    return unavailable()


def lower_max_pool(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One qpass.packed_max_pool in front of `node`."""
    return add_call(gm, Q.packed_max_pool.default, node.args, node)


def _held(node: object) -> Tensor:
    value = constant(node)
    assert value is not None
    return value
