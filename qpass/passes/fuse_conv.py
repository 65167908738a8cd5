"""Fuse integer convolutions with what stands around them, as fuse.py does for linears.

convolution(dequantize(x), dequantize(w), b)   ->  qpass.conv(x, w, b)
qpass.conv(...) + dequantize(other)            ->  qpass.conv(..., other)      also a float other, and one that was cast
act(qpass.conv(...))                           ->  qpass.conv(..., act)
minimum(relu(qpass.conv(...)), h)              ->  qpass.conv(..., cap, h)         h: one bound a channel
quantize(qpass.conv(...))                      ->  qpass.conv(..., u8)
"""

from __future__ import annotations

import torch

from qpass.rewrite import Rule, rule

aten = torch.ops.aten
Q = torch.ops.qpass
NOTHING = (None, None, None, "")  # other and its parameters


def _conv(x, xs, xz, xt, w, ws, wt, b, other, act, slope, out, dtype, walk):
    return Q.conv.default(x, xs, xz, xt, w, ws, wt, b, *other, act, slope, *out, dtype, *walk)


@rule
def integer_conv(x, xs, xz, xt, xd, w, ws, wt, wd, b, stride, padding, dilation, transposed, more, groups):
    """convolution(dequantize(x), dequantize(w), b)  ->  qpass.conv

    1. the input is per tensor or per sample, the weight per output channel.
    """
    real = Q.dequantize.default(x, xs, xz, xt, xd)
    weight = Q.dequantize.default(w, ws, None, wt, wd)
    return aten.convolution.default(real, weight, b, stride, padding, dilation, transposed, more, groups)


@integer_conv.check
def _(xt, wt, transposed, **_):
    if not xt.endswith(("/t", "/sample")):
        return f"an input of {xt} has more than one scale in a product"
    own = f"/c{int(transposed)}"
    return None if wt.endswith(("/t", own)) else f"a weight of {wt} has no scale for each output channel"


@integer_conv.to
def _(x, xs, xz, xt, xd, w, ws, wt, wd, b, stride, padding, dilation, transposed, more, groups):
    walk = (stride, padding, dilation, transposed, more, groups)
    return _conv(x, xs, xz, xt, w, ws, wt, b, NOTHING, "", None, (None, None, ""), xd, walk)


@rule
def conv_integer_residual(x, xs, xz, xt, w, ws, wt, b, dtype, s, p, d, t, o, g, other, ots, otz, ott):
    """qpass.conv(...) + dequantize(other)  ->  qpass.conv(..., other)

    1. other has the shape of the convolution's result, and one scale.
    """
    y = _conv(x, xs, xz, xt, w, ws, wt, b, NOTHING, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))
    return aten.add.Tensor(y, Q.dequantize.default(other, ots, otz, ott, dtype))


@conv_integer_residual.check
def _(match, other, ott, **_):
    if not ott.endswith("/t"):
        return f"a residual of {ott} has no single scale"
    return _same_shape(match, other)


@conv_integer_residual.to
def _(x, xs, xz, xt, w, ws, wt, b, dtype, s, p, d, t, o, g, other, ots, otz, ott):
    added = (other, ots, otz, ott)
    return _conv(x, xs, xz, xt, w, ws, wt, b, added, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))


@rule
def conv_residual(x, xs, xz, xt, w, ws, wt, b, dtype, s, p, d, t, o, g, other):
    """qpass.conv(...) + other  ->  qpass.conv(..., other)

    1. other has the shape and dtype of the convolution's result: it is added, not broadcast.
    """
    y = _conv(x, xs, xz, xt, w, ws, wt, b, NOTHING, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))
    return aten.add.Tensor(y, other)


@conv_residual.check
def _(match, other, dtype, **_):
    value = getattr(other, "meta", {}).get("val")
    if not isinstance(value, torch.Tensor) or value.dtype is not dtype:
        return "the residual is a number or of another dtype; it is added after the convolution"
    return _same_shape(match, other)


@conv_residual.to
def _(x, xs, xz, xt, w, ws, wt, b, dtype, s, p, d, t, o, g, other):
    added = (other, None, None, "")
    return _conv(x, xs, xz, xt, w, ws, wt, b, added, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))


@rule
def conv_cast_residual(x, xs, xz, xt, w, ws, wt, b, dtype, s, p, d, t, o, g, other):
    """qpass.conv(...) + float(other)  ->  qpass.conv(..., other)

    1. other has the shape of the convolution's result.
    """
    y = _conv(x, xs, xz, xt, w, ws, wt, b, NOTHING, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))
    return aten.add.Tensor(y, aten.to.dtype(other, dtype))


@conv_cast_residual.check
def _(match, other, **_):
    return _same_shape(match, other)


@conv_cast_residual.to
def _(x, xs, xz, xt, w, ws, wt, b, dtype, s, p, d, t, o, g, other):
    added = (other, None, None, "")
    return _conv(x, xs, xz, xt, w, ws, wt, b, added, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))


@rule
def conv_cast(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, act, slope, dtype, s, p, d, t, o, g, to):
    """qpass.conv(...).to(bfloat16)  ->  qpass.conv(..., bfloat16)

    1. the dtype is a float of 16 or 32 bits.
    """
    added = (other, ots, otz, ott)
    y = _conv(x, xs, xz, xt, w, ws, wt, b, added, act, slope, (None, None, ""), dtype, (s, p, d, t, o, g))
    return aten.to.dtype(y, to)


@conv_cast.check
def _(to, **_):
    return None if to in (torch.float32, torch.bfloat16, torch.float16) else f"convolutions do not write {to}"


@conv_cast.to
def _(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, act, slope, dtype, s, p, d, t, o, g, to):
    added = (other, ots, otz, ott)
    return _conv(x, xs, xz, xt, w, ws, wt, b, added, act, slope, (None, None, ""), to, (s, p, d, t, o, g))


def _same_shape(match, other) -> str | None:
    same = str(other.meta["val"].shape) == str(match.root.meta["val"].shape)
    return None if same else "the residual is broadcast; it is added after the convolution"


def activation_rule(name: str, act: str, function) -> Rule:
    """act(qpass.conv(...))  ->  qpass.conv(..., act)"""

    def pattern(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, dtype, s, p, d, t, o, g):
        added = (other, ots, otz, ott)
        return function(
            _conv(x, xs, xz, xt, w, ws, wt, b, added, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))
        )

    def replacement(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, dtype, s, p, d, t, o, g):
        added = (other, ots, otz, ott)
        return _conv(x, xs, xz, xt, w, ws, wt, b, added, act, None, (None, None, ""), dtype, (s, p, d, t, o, g))

    pattern.__name__, pattern.__doc__ = name, activation_rule.__doc__
    made = rule(pattern)
    made.to(replacement)
    return made


@rule
def conv_prelu(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, dtype, s, p, d, t, o, g, slope):
    """prelu(qpass.conv(...), slope)  ->  qpass.conv(..., prelu)"""
    added = (other, ots, otz, ott)
    y = _conv(x, xs, xz, xt, w, ws, wt, b, added, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))
    return aten.prelu.default(y, slope)


@conv_prelu.to
def _(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, dtype, s, p, d, t, o, g, slope):
    added = (other, ots, otz, ott)
    return _conv(x, xs, xz, xt, w, ws, wt, b, added, "prelu", slope, (None, None, ""), dtype, (s, p, d, t, o, g))


@rule
def conv_cap(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, dtype, s, p, d, t, o, g, bound):
    """minimum(relu(qpass.conv(...)), bound)  ->  qpass.conv(..., cap, bound)

    1. bound has one number for each channel: [N, 1, ...].
    """
    added = (other, ots, otz, ott)
    y = _conv(x, xs, xz, xt, w, ws, wt, b, added, "", None, (None, None, ""), dtype, (s, p, d, t, o, g))
    return aten.minimum.default(aten.relu.default(y), bound)


@conv_cap.check
def _(match, bound, **_):
    shape, value = getattr(bound, "meta", {}).get("val"), match.root.meta["val"]
    channels = shape is not None and tuple(shape.shape) == (value.shape[1], *[1] * (value.dim() - 2))
    return None if channels else "the bound is not one number for each channel"


@conv_cap.to
def _(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, dtype, s, p, d, t, o, g, bound):
    added = (other, ots, otz, ott)
    return _conv(x, xs, xz, xt, w, ws, wt, b, added, "cap", bound, (None, None, ""), dtype, (s, p, d, t, o, g))


@rule
def conv_requantize(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, act, slope, dtype, s, p, d, t, o, g, os, oz, ot):
    """quantize(qpass.conv(...))  ->  qpass.conv(..., integers)

    1. the type is per tensor: scale and zero point are constants, known before the product.
    """
    added = (other, ots, otz, ott)
    y = _conv(x, xs, xz, xt, w, ws, wt, b, added, act, slope, (None, None, ""), dtype, (s, p, d, t, o, g))
    return Q.quantize.default(y, os, oz, ot)


@conv_requantize.check
def _(os, ot, **_):
    if not ot.endswith("/t"):
        return f"a type of {ot} is chosen from the whole result, after the product"
    return None if os.op == "get_attr" else "its scale is chosen at run time"


@conv_requantize.to
def _(x, xs, xz, xt, w, ws, wt, b, other, ots, otz, ott, act, slope, dtype, s, p, d, t, o, g, os, oz, ot):
    added = (other, ots, otz, ott)
    return _conv(x, xs, xz, xt, w, ws, wt, b, added, act, slope, (os, oz, ot), dtype, (s, p, d, t, o, g))


CONV = (integer_conv,)
CONV_EPILOGUE = (
    conv_requantize,
    conv_integer_residual,
    conv_cast_residual,
    conv_residual,
    conv_cast,
    conv_prelu,
    conv_cap,
    activation_rule("conv_relu", "relu", lambda y: aten.relu.default(y)),
    activation_rule("conv_relu6", "relu6", lambda y: aten.relu6.default(y)),
    activation_rule("conv_silu", "silu", lambda y: aten.silu.default(y)),
    activation_rule("conv_hardswish", "hardswish", lambda y: aten.hardswish.default(y)),
    activation_rule("conv_hardsigmoid", "hardsigmoid", lambda y: aten.hardsigmoid.default(y)),
    activation_rule("conv_sigmoid", "sigmoid", lambda y: aten.sigmoid.default(y)),
    activation_rule("conv_gelu", "gelu", lambda y: aten.gelu.default(y)),
    activation_rule("conv_gelu_tanh", "gelu_tanh", lambda y: aten.gelu.default(y, approximate="tanh")),
)
