"""Fused convolutions on oneDNN: static int8, with what its kernels take of the epilogue, the rest as pointwise work.

    qpass.conv(x u8/t, w i8/c0, b, other u8/t, relu, -> u8)   ->   onednn.qconv2d_pointwise.binary, summed onto `other`
    qpass.conv(x u8/t, w i8/c0, b, act, -> f32 | bf16 | u8)   ->   onednn.qconv2d_pointwise

The sum overwrites `other`; where its memory is read by somebody else, or as x, a copy is summed onto.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.backends.onednn import ACTIVATION_CALLS
from qpass.conv_ops import conv_shape
from qpass.graphs import add_call, add_constant, constant, is_view

aten = torch.ops.aten
onednn = torch.ops.onednn
Q = torch.ops.qpass

PLAIN = (onednn.qconv1d_pointwise.default, onednn.qconv2d_pointwise.default, onednn.qconv3d_pointwise.default)
SUM = onednn.qconv2d_pointwise.binary
CALLS = (*PLAIN, SUM)
# activation -> post-op name and its scalars
POST_OPS = {
    "": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
}
ACTIVATIONS = ACTIVATION_CALLS | {
    "relu6": (aten.relu6.default, {}),
    "hardswish": (aten.hardswish.default, {}),
    "hardsigmoid": (aten.hardsigmoid.default, {}),
    "sigmoid": (aten.sigmoid.default, {}),
}
OUTPUTS = (torch.float32, torch.bfloat16)


def why_not(node: fx.Node) -> str | None:
    """None where oneDNN runs a fused convolution, or why not."""
    x_type, weight_type, dtype, transposed = node.args[3], node.args[6], node.args[17], node.args[21]
    if x_type != "u8/t" or constant(node.args[1]) is None:
        return f"oneDNN's convolutions read u8/t with a constant scale, not {x_type}"
    if transposed:
        return "oneDNN has no transposed convolution of integers"
    if not weight_type.startswith("i8"):
        return f"oneDNN multiplies weights of i8, not {weight_type}"
    if any(constant(node.args[i]) is None for i in (4, 5)) or (
        node.args[7] is not None and constant(node.args[7]) is None
    ):
        return "its weight or bias is not a constant of the graph"
    if node.args[16] not in ("", "u8/t"):
        return f"oneDNN writes u8/t, not {node.args[16]}"
    return None if node.args[16] or dtype in OUTPUTS else f"oneDNN does not write {dtype}"


def lower_conv(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The nodes that compute a fused convolution, in front of `node`; returns the last."""
    other, act, slope = node.args[8], node.args[12], node.args[13]
    whole = act in POST_OPS and slope is None and (not act or node.args[4].meta["val"].dim() < 5)  # none on three axes
    if other is None and whole:
        return _call(gm, node, *_target(node), act, None)
    if whole and act in ("", "relu") and _summable(node):
        return _call(gm, node, *_target(node), act, other)
    y = _call(gm, node, 1.0, 0, torch.float32, "", None)
    return _epilogue(gm, node, y)


def _target(node: fx.Node) -> tuple[float, int, torch.dtype]:
    if not node.args[16]:
        return 1.0, 0, node.args[17]
    return float(_held(node.args[14])), int(_held(node.args[15])), torch.uint8


def _held(node: object) -> Tensor:
    value = constant(node)
    assert value is not None
    return value


def _summable(node: fx.Node) -> bool:
    """The sum is made in place: the addend is an image of the result's own type, which is what the result has then."""
    other, other_type, out_type, dtype = node.args[8], node.args[11], node.args[16], node.args[17]
    held = other.meta["val"]
    floats = not other_type and not out_type and held.dtype is dtype is torch.float32
    return held.dim() == 4 and ((other_type == "u8/t" and out_type == "u8/t") or floats)


def _call(gm: fx.GraphModule, node: fx.Node, scale: float, zero: int, dtype: torch.dtype, act: str, other) -> fx.Node:
    x, x_scale, x_zero = node.args[0], float(_held(node.args[1])), int(_held(node.args[2]))
    weight, bias = _held(node.args[4]), node.args[7]
    stride, padding, dilation, _, _, groups = node.args[18:]
    w_scale = _held(node.args[5]).float().expand(weight.shape[0]).contiguous()
    name = node.meta.get("site", "conv")
    packed = onednn.qconv_prepack.default(
        weight.contiguous(), w_scale, x_scale, x_zero, stride, padding, dilation, groups, None
    )
    held = {"packed": packed, "scale": w_scale, "zero": torch.zeros(weight.shape[0], dtype=torch.int32)}
    constants = [add_constant(gm, f"{name}_{key}", t, node) for key, t in held.items()]
    if bias is not None:
        bias = add_constant(gm, f"{name}_bias", _held(bias).detach().float(), node)
    walk = (stride, padding, dilation, groups)
    post, scalars = POST_OPS[act]
    if other is None:
        args = (x, x_scale, x_zero, *constants, bias, *walk, scale, zero, dtype, post, scalars, "")
        target = PLAIN[weight.dim() - 3]
    else:
        quantized = bool(node.args[11])
        at = (float(_held(node.args[9])), int(_held(node.args[10]))) if quantized else (1.0, 0)
        if not _is_own(other, node):
            other = add_call(gm, aten.clone.default, (other,), node)
        args = (
            x,
            x_scale,
            x_zero,
            *constants,
            other,
            bias,
            *walk,
            scale,
            zero,
            dtype,
            *at,
            "sum",
            1.0,
            post,
            scalars,
            "",
        )
        target = SUM
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(target, args)
    call.meta = {key: node.meta[key] for key in ("nn_module_stack", "site") if key in node.meta}
    call.meta["val"] = _image(node, weight, dtype)
    return call


def _is_own(other: fx.Node, node: fx.Node) -> bool:
    """Whether the memory of an addend is read by its sum alone, which may then overwrite it."""
    if sum(value is other for value in node.args) > 1:
        return False
    while other.op == "call_function" and len(other.users) == 1:
        if not is_view(other):
            return True
        other = other.args[0]
    return False


def _image(node: fx.Node, weight: Tensor, dtype: torch.dtype) -> Tensor:
    x = node.args[0].meta["val"]
    batch, channels, *sizes = conv_shape(x.shape, weight.shape, *node.args[18:])
    with x.fake_mode:
        return torch.empty((batch, *sizes, channels), dtype=dtype).movedim(-1, 1)


def _epilogue(gm: fx.GraphModule, node: fx.Node, y: fx.Node) -> fx.Node:
    """What is left of a fused convolution after its float32 result: residual, activation, quantize or cast."""
    other, other_scale, other_zero, other_type, act, slope, out_scale, out_zero, out_type, dtype = node.args[8:18]
    if other is not None:
        if other_type:
            other = add_call(
                gm, Q.dequantize.default, (other, other_scale, other_zero, other_type, torch.float32), node
            )
        y = add_call(gm, aten.add.Tensor, (y, other), node)
    if act == "cap":
        y = add_call(gm, aten.minimum.default, (add_call(gm, aten.relu.default, (y,), node), slope), node)
    elif slope is not None:
        y = add_call(gm, aten.prelu.default, (y, slope), node)
    elif act:
        target, options = ACTIVATIONS[act]
        y = add_call(gm, target, (y,), node, **options)
    if out_type:
        return add_call(gm, Q.quantize.default, (y, out_scale, out_zero, out_type), node)
    return y if dtype is torch.float32 else add_call(gm, aten.to.dtype, (y, dtype), node)
