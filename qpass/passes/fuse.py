"""Fuse integer linears with what stands around them: one op from integers to the next layer's integers. For convolutions
see fuse_conv.py.

    linear(dequantize(x), dequantize(w), b)      ->  qpass.linear(x, w, b)
    act(qpass.linear(...))                       ->  qpass.linear(..., act)
    qpass.linear(...) + other                    ->  qpass.linear(..., other)
    to(qpass.linear(...), bf16)                  ->  qpass.linear(..., bf16)
    quantize(qpass.linear(...))                  ->  qpass.linear(..., u8)

Equal to accumulator rounding: the integer sum is exact, the float one is not. The bigger rule comes first.
"""

from __future__ import annotations

import torch

from qpass.passes.fuse_conv import CONV, CONV_EPILOGUE
from qpass.passes.fuse_nested import NESTED
from qpass.rewrite import apply, rule

aten = torch.ops.aten
Q = torch.ops.qpass


@rule
def integer_linear(x, xs, xz, xt, xd, w, ws, wt, wd, b):
    """linear(dequantize(x), dequantize(w), b)  ->  qpass.linear

    1. the weight is symmetric, with one scale per output channel, per group of its row, or one in all. (One with zero
       points keeps its dequantize, and its product with the dequantized input is a float one.)
    2. the activation is per tensor or per token.
    """
    real = Q.dequantize.default(x, xs, xz, xt, xd)
    return aten.linear.default(real, Q.dequantize.default(w, ws, None, wt, wd), b)


@integer_linear.to
def _(x, xs, xz, xt, xd, w, ws, wt, wd, b):
    return Q.linear.default(x, xs, xz, xt, w, ws, wt, b, None, "", None, None, "", xd)


@rule
def weight_only_linear(x, w, ws, wz, wt, wd, b):
    """linear(x, dequantize(w), b)  ->  qpass.linear with a float activation"""
    return aten.linear.default(x, Q.dequantize.default(w, ws, wz, wt, wd), b)


@weight_only_linear.to
def _(x, w, ws, wz, wt, wd, b):
    return Q.linear.default(x, None, None, "", w, ws, wt, b, None, "", None, None, "", wd, wz)


def _product(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype):
    return Q.linear.default(x, xs, xz, xt, w, ws, wt, b, other, act, None, None, "", dtype, wz)


@rule
def residual(x, xs, xz, xt, w, ws, wt, wz, b, dtype, other):
    """qpass.linear(...) + other  ->  qpass.linear(..., other)

    1. other has the shape and dtype of the linear's result: it is added, not broadcast.
    """
    return aten.add.Tensor(_product(x, xs, xz, xt, w, ws, wt, wz, b, None, "", dtype), other)


@residual.check
def _(match, other, dtype, **_):
    value, result = getattr(other, "meta", {}).get("val"), match.root.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dtype is not dtype or str(value.shape) != str(result.shape):
        return "the residual is broadcast or of another dtype; it is added after the linear"
    return None


@residual.to
def _(x, xs, xz, xt, w, ws, wt, wz, b, dtype, other):
    return _product(x, xs, xz, xt, w, ws, wt, wz, b, other, "", dtype)


def activation_rule(name, act, function):
    """act(qpass.linear(...))  ->  qpass.linear(..., act)"""

    def pattern(x, xs, xz, xt, w, ws, wt, wz, b, other, dtype):
        return function(_product(x, xs, xz, xt, w, ws, wt, wz, b, other, "", dtype))

    def replacement(x, xs, xz, xt, w, ws, wt, wz, b, other, dtype):
        return _product(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype)

    pattern.__name__, pattern.__doc__ = name, activation_rule.__doc__
    made = rule(pattern)
    made.to(replacement)
    return made


@rule
def requantize(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype, scale, zero, qtype):
    """quantize(qpass.linear(...))  ->  qpass.linear(..., integers)

    1. the type is per tensor: scale and zero point are known before the product.
    """
    y = _product(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype)
    return Q.quantize.default(y, scale, zero, qtype)


@requantize.check
def _(qtype, **_):
    return None if qtype.endswith("/t") else f"a type of {qtype} is chosen from the whole row, after the product"


@requantize.to
def _(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype, scale, zero, qtype):
    return Q.linear.default(x, xs, xz, xt, w, ws, wt, b, other, act, scale, zero, qtype, dtype, wz)


@rule
def cast(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype, to, blocking, copy, memory):
    """to(qpass.linear(...), bf16)  ->  qpass.linear(..., bf16): one rounding instead of two"""
    y = _product(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype)
    return aten.to.dtype(y, to, blocking, copy, memory)


@cast.to
def _(x, xs, xz, xt, w, ws, wt, wz, b, other, act, dtype, to, blocking, copy, memory):
    return _product(x, xs, xz, xt, w, ws, wt, wz, b, other, act, to)


@rule
def packed_lookup(w, ws, wt, wd, i, padding, scaled, sparse):
    """embedding(dequantize(w), i)  ->  embedding(w, i) * embedding(scale, i): only the rows that are read

    1. one scale per row: the rows of a packed lookup that is tied to a linear.
    """
    table = Q.dequantize.default(w, ws, None, wt, wd)
    return aten.embedding.default(table, i, padding, scaled, sparse)


@packed_lookup.check
def _(wt, **_):
    return None if wt.endswith("/c0") else f"a table of {wt} has no scale per row"


@packed_lookup.to
def _(w, ws, wt, wd, i, padding, scaled, sparse):
    rows = aten.to.dtype(aten.embedding.default(w, i), wd)
    return aten.mul.Tensor(rows, aten.to.dtype(aten.embedding.default(aten.unsqueeze.default(ws, 1), i), wd))


@rule
def grouped_lookup(w, ws, wz, wt, wd, i, padding, scaled, sparse):
    """embedding(dequantize(w), i)  ->  dequantize(embedding(w, i), embedding(scale, i)): only the rows that are read

    1. scales of groups of each row, with zero points or without.
    """
    table = Q.dequantize.default(w, ws, wz, wt, wd)
    return aten.embedding.default(table, i, padding, scaled, sparse)


@grouped_lookup.check
def _(wt, **_):
    return None if "/g" in wt else f"a table of {wt} has no scales of groups in its rows"


@grouped_lookup.to
def _(w, ws, wz, wt, wd, i, padding, scaled, sparse):
    zero = None if wz is None else aten.embedding.default(wz, i)
    return Q.dequantize.default(aten.embedding.default(w, i), aten.embedding.default(ws, i), zero, wt, wd)


@rule
def offset_lookup(w, ws, wz, wt, wd, i, padding, scaled, sparse):
    """embedding(dequantize(w), i)  ->  (embedding(w, i) - embedding(zero, i)) * embedding(scale, i)

    1. one scale and one zero point per row.
    """
    table = Q.dequantize.default(w, ws, wz, wt, wd)
    return aten.embedding.default(table, i, padding, scaled, sparse)


@offset_lookup.check
def _(wt, wz, **_):
    return None if wt.endswith("/c0") and wz is not None else f"a table of {wt} has no zero point per row"


@offset_lookup.to
def _(w, ws, wz, wt, wd, i, padding, scaled, sparse):
    zero = aten.to.dtype(aten.embedding.default(aten.unsqueeze.default(wz, 1), i), wd)
    rows = aten.sub.Tensor(aten.to.dtype(aten.embedding.default(w, i), wd), zero)
    return aten.mul.Tensor(rows, aten.to.dtype(aten.embedding.default(aten.unsqueeze.default(ws, 1), i), wd))


@rule
def halved_lookup(data, wt, i, padding, scaled, sparse):
    """embedding(whole(q), i)  ->  whole(embedding(q, i)): the rows that are read become whole codes, not the table"""
    return aten.embedding.default(Q.whole.default(data, wt), i, padding, scaled, sparse)


@halved_lookup.to
def _(data, wt, i, padding, scaled, sparse):
    return Q.whole.default(aten.embedding.default(data, i, padding, scaled, sparse), wt)


LINEAR = (integer_linear, weight_only_linear, *NESTED, packed_lookup, grouped_lookup, offset_lookup)
EPILOGUE = (
    halved_lookup,
    requantize,
    cast,
    residual,
    activation_rule("linear_relu", "relu", lambda y: aten.relu.default(y)),
    activation_rule("linear_silu", "silu", lambda y: aten.silu.default(y)),
    activation_rule("linear_gelu", "gelu", lambda y: aten.gelu.default(y)),
    activation_rule("linear_gelu_tanh", "gelu_tanh", lambda y: aten.gelu.default(y, approximate="tanh")),
)
SWEEPS = 4  # residual, activation, cast and requantize stand behind one another


def fuse(gm, context) -> int:
    """Integer linears and convolutions first, then whatever stands behind them, until nothing does."""
    edits = apply(gm, (*LINEAR, *CONV), context.log)
    for _ in range(SWEEPS):
        found = apply(gm, (*EPILOGUE, *CONV_EPILOGUE), context.log)
        edits += found
        if not found:
            break
    return edits
