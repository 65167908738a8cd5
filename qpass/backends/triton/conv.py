"""Fused convolutions and max pools as the ops of qpass_kernels, on images that lie channels last.

    qpass.conv(x u8/t | u8/sample, w i8/c0, b, other, act, -> u8 | float)   ->   conv2d, or depthwise2d where a group is one
                                                                                 channel
    qpass.max_pool(q)                                                       ->   max_pool2d

Weights are packed once, here, with what the zero point of the input adds at the borders (qpass_kernels/conv_weights.py). A
signal [B, C, L] is an image of one row.
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.backends.triton.codes import signed, signed_zero, static_zero, unsigned
from qpass.backends.triton.package import kernels, too_old
from qpass.conv_ops import channel_scales
from qpass.graphs import add_call, add_constant, constant

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
X_SCALE, X_ZERO, X_TYPE, WEIGHT, WEIGHT_SCALE, WEIGHT_TYPE, BIAS, OTHER, OTHER_SCALE, OTHER_ZERO, OTHER_TYPE = range(
    1, 12
)
ACT, SLOPE, OUT_SCALE, OUT_ZERO, OUT_TYPE, OUT_DTYPE, STRIDE, PADDING, DILATION, TRANSPOSED, _, GROUPS = range(12, 24)
ONE_SCALE = ("/t", "/c0")


def why_not(node: fx.Node) -> str | None:
    """None where a kernel runs a fused convolution, or the sentence that says why not."""
    a = node.args
    if len(a[STRIDE]) > 2 or a[TRANSPOSED]:
        kind = "transposed" if a[TRANSPOSED] else f"{len(a[STRIDE])}-d"
        return f"the triton kernels run convolutions of images and signals, not {kind} ones"
    if a[X_TYPE] not in ("u8/t", "u8/sample"):
        return f"the triton kernels convolve images of u8/t or u8/sample, not {a[X_TYPE]}"
    if not a[WEIGHT_TYPE].startswith("i") or not a[WEIGHT_TYPE].endswith(ONE_SCALE):
        return f"the triton kernels convolve with integers of one scale a channel, not {a[WEIGHT_TYPE]}"
    held = (WEIGHT, WEIGHT_SCALE) if a[X_TYPE] == "u8/sample" else (X_SCALE, X_ZERO, WEIGHT, WEIGHT_SCALE)
    if any(constant(a[i]) is None for i in held):
        return "its weight or the scale of its input is computed"
    return too_old(a[0].meta["val"].device) or _why_not_epilogue(a)


def _why_not_epilogue(a: tuple) -> str | None:
    if a[OUT_TYPE] not in ("", "u8/t") or (not a[OUT_TYPE] and a[OUT_DTYPE] not in FLOATS):
        return f"the triton kernels write u8/t or floats of up to 32 bits, not {a[OUT_TYPE] or a[OUT_DTYPE]}"
    if a[OTHER] is not None and a[OTHER_TYPE] not in ("", "u8/t"):
        return f"the triton kernels add codes of u8/t, not {a[OTHER_TYPE]}"
    if a[OTHER] is not None and not a[OTHER_TYPE] and a[OTHER].meta["val"].dtype not in FLOATS:
        return f"the triton kernels do not add {a[OTHER].meta['val'].dtype}"
    held = (BIAS, OTHER_SCALE, OTHER_ZERO, SLOPE, OUT_SCALE, OUT_ZERO)
    if any(a[i] is not None and constant(a[i]) is None for i in held):
        return "its bias, its slopes or the scale of its output are computed"
    return None


def is_depthwise(node: fx.Node) -> bool:
    """Whether each channel is convolved with a kernel of its own."""
    weight, groups = constant(node.args[WEIGHT]), node.args[GROUPS]
    return groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One op in front of `node`, and what turns codes; returns the last."""
    a, packing = node.args, kernels().conv_weights
    weight, own = constant(a[WEIGHT]), a[X_TYPE] == "u8/sample"
    weight = weight if weight.dim() == 4 else weight.unsqueeze(2)
    zero = 0 if own else static_zero(a[X_ZERO])
    name = node.meta.get("site", "conv")
    hold = lambda key, t: None if t is None else add_constant(gm, f"{name}_{key}", t.contiguous(), node)  # noqa: E731
    K = torch.ops.qpass_kernels
    if is_depthwise(node):
        target, first = K.depthwise2d.default, (hold("packed", packing.pack_depthwise(weight)), zero)
    else:
        target = K.conv2d.default
        first = (
            hold("packed", packing.pack(weight)),
            hold("correction", packing.correction(weight, 1 if own else zero)),
        )
    alpha = channel_scales(constant(a[WEIGHT_SCALE]), weight.shape[0]).float()
    alpha = alpha if own else alpha * constant(a[X_SCALE]).float()
    samples = (a[X_SCALE], signed_zero(gm, a[X_ZERO], node)) if own else (None, None)
    vector = lambda i: None if a[i] is None else constant(a[i]).detach().float().flatten()  # noqa: E731
    slope = vector(SLOPE)
    slope = None if slope is None else slope.expand(weight.shape[0])
    window = (in_two(fill, a[i], len(a[STRIDE])) for fill, i in ((1, STRIDE), (0, PADDING), (1, DILATION)))
    after = (hold("alpha", alpha), hold("beta", vector(BIAS)), *_residual(gm, node), a[ACT], hold("slope", slope))
    x = as_image(gm, signed(gm, a[0], node), node)
    made = add_call(
        gm, target, (x, *first, list(weight.shape[2:]), *window, *after, *_output(node), *samples, a[GROUPS]), node
    )
    return _as_before(gm, unsigned(gm, made, node) if a[OUT_TYPE] else made, node)


def in_two(fill: int, values: list[int], axes: int) -> list[int]:
    """Numbers of a window over an image; those along a signal have `fill` for its one row in front of each."""
    return values if axes == 2 else [number for value in values for number in (fill, value)]


def as_image(gm: fx.GraphModule, value: fx.Node, before: fx.Node) -> fx.Node:
    """A signal [B, C, L] as [B, C, 1, L]; an image as it is."""
    return value if value.meta["val"].dim() == 4 else add_call(gm, aten.unsqueeze.default, (value, 2), before)


def _as_before(gm: fx.GraphModule, made: fx.Node, node: fx.Node) -> fx.Node:
    """The result as `node` has it: of a signal, without the row."""
    return made if node.meta["val"].dim() == 4 else add_call(gm, aten.squeeze.dim, (made, 2), node)


def _residual(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, float, int]:
    other, scale, zero, kind = node.args[OTHER : OTHER_TYPE + 1]
    if other is None or not kind:
        return other and as_image(gm, other, node), 1.0, 0
    return as_image(gm, signed(gm, other, node), node), float(constant(scale)), static_zero(zero)


def _output(node: fx.Node) -> tuple[float, int, torch.dtype]:
    scale, zero, kind, dtype = node.args[OUT_SCALE : OUT_DTYPE + 1]
    return (float(constant(scale)), static_zero(zero), torch.int8) if kind else (1.0, 0, dtype)


def why_not_max_pool(node: fx.Node) -> str | None:
    """None where a kernel runs a max pool of codes, or why not."""
    if len(node.args[1]) > 2:
        return f"the triton kernels pool images and signals, not {len(node.args[1])}-d values"
    return too_old(node.args[0].meta["val"].device)


def lower_max_pool(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One op in front of `node`, and what turns codes; returns the last."""
    q, *window, ceil_mode = node.args
    window = [in_two(fill, values, len(window[0])) for fill, values in zip((1, 1, 0, 1), window, strict=True)]
    x = as_image(gm, signed(gm, q, node), node)
    made = add_call(gm, torch.ops.qpass_kernels.max_pool2d.default, (x, *window, ceil_mode), node)
    return _as_before(gm, unsigned(gm, made, node), node)
