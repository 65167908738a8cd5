"""Linears on the weight as the model stores it: no copy of it is laid out, and a few rows cost its bytes once.

    qpass.linear(x float, codes, scale, zero, b, other, act)      ->   qpass.stored_linear(x, stored, scale, zero, ...)
    qpass.linear(x codes, weight in groups or with zero points)   ->   the same, with the scale and zero point of rows

    up to FEW rows    every code is multiplied as it is read (src/stored.cpp)
    more              the weight is written out in the input's type, once a call, and torch multiplies (AMX where there is)

So one graph serves the prompt and the tokens after it: rows are counted when it runs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.nn import functional

from qpass import affine, packing
from qpass.backends.native.arguments import ACTIVATIONS, OUT_TYPES
from qpass.backends.native.build import library, unavailable
from qpass.backends.native.calls import Call, kernel
from qpass.graphs import add_call, add_constant, constant
from qpass.ops import activation, define
from qpass.qtype import QType

Q = torch.ops.qpass
Run = Callable[..., Tensor]
STORED = struct.Struct("9P 4q 8i")  # src/stored.cpp
FLOATS = (torch.float32, torch.bfloat16)
FEW = {
    torch.bfloat16: 16,
    torch.float32: 6,
    torch.uint8: 16,
}  # rows up to which reading codes beats writing the weight out


def stored_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    type: str,
    bias: Tensor | None,
    other: Tensor | None,
    act: str,
    dtype: torch.dtype,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
) -> Tensor:
    """Y = act(x @ dequantize(data).T + bias + other), [..., N] in `dtype`, computed in float32.

    x: float32 or bfloat16 [..., K]; or uint8 codes, with x_scale, float32, and x_zero, int32, [..., 1] or []. data: codes
    [N, K] of `type`, or uint8 [N, K / 2] of two each. scale: float32 [N] or [N, K / G]; zero: uint8 or int32 of that
    shape. bias: [N]. other: [..., N].
    """
    qtype = QType.parse(type)
    codes = packing.whole(data, qtype) if data.shape[1] != x.shape[-1] else data
    real = x.float() if x_scale is None else (x.float() - x_zero) * x_scale
    y = functional.linear(real, affine.dequantize(codes, scale, zero, qtype))
    y = y if bias is None else y + bias.float()
    return activation(act)(y if other is None else y + other.float()).to(dtype)


def _fake(x, data, scale, zero, type, bias, other, act, dtype, x_scale=None, x_zero=None):
    return x.new_empty((*x.shape[:-1], data.shape[0]), dtype=dtype)


define(
    "stored_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, str type, Tensor? bias, Tensor? other, str act, "
    "ScalarType dtype, Tensor? x_scale=None, Tensor? x_zero=None) -> Tensor",
    stored_linear,
    _fake,
)


def why_not(node: fx.Node) -> str | None:
    """None where the kernel runs a fused linear, or why not."""
    if unavailable() is not None:
        return unavailable()
    if not hasattr(library(), "qpass_stored"):
        return "this processor lacks avx512_bf16"
    x, data, weight_type, bias, other, act, out_type, dtype, zero = (
        node.args[i] for i in (0, 4, 6, 7, 8, 9, 12, 13, 14)
    )
    held, qtype = constant(data), QType.parse(weight_type)
    written = dtype in FLOATS and (not out_type or node.args[3] == out_type == "u8/t")
    if not written or act not in ACTIVATIONS or (not node.args[3] and x.meta["val"].dtype not in FLOATS):
        return "the kernel reads and writes float32 and bfloat16"
    if node.args[3] not in ("", "u8/t", "u8/token"):
        return f"the kernel reads codes of u8/t or u8/token, not {node.args[3]}"
    if held is None or constant(node.args[5]) is None or (bias is not None and constant(bias) is None):
        return "its weight, scale or bias is no constant of the graph"
    if other is not None and other.meta["val"].dtype not in FLOATS:
        return f"the kernel does not add {other.meta['val'].dtype}"
    if qtype.is_float or (qtype.axis not in (0, None)) or qtype.granularity == "tensor":
        return f"the kernel has no tables for {weight_type}"
    if qtype.bits > 4 and (zero is not None or not qtype.signed):
        return "the kernel takes zero points of weights of up to 4 bits"
    if qtype.bits <= 4 and not packing.halves(held, qtype):
        return "its codes are stored one a byte"
    group = qtype.group
    return None if group is None or group % 64 == 0 or (group == 32 and qtype.bits <= 4) else f"groups of {group}"


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One qpass.stored_linear in front of `node`, on the stored codes themselves, and the quantize of what it gives."""
    x, data, scale, qtype, bias, other, act, dtype, zero = (node.args[i] for i in (0, 4, 5, 6, 7, 8, 9, 13, 14))
    out_scale, out_zero, out_type = node.args[10:13]
    stored = data.args[0] if data.target is Q.whole.default else data
    name = node.meta.get("site", "linear")

    def hold(key: str, held: fx.Node | None) -> fx.Node | None:
        return None if held is None else add_constant(gm, f"{name}_{key}", constant(held).detach(), node)

    weight = (hold("stored", stored), hold("scale", scale), hold("zero", zero))
    end = (act, torch.float32 if out_type else dtype, *(node.args[1:3] if node.args[3] else ()))
    y = add_call(gm, Q.stored_linear.default, (x, *weight, qtype, hold("bias", bias), other, *end), node)
    return add_call(gm, Q.quantize.default, (y, out_scale, out_zero, out_type), node) if out_type else y


def stored_call(node: fx.Node) -> Call:
    """A call of qpass.stored_linear; codes that came one a byte (a constant of the graph) are put together here."""
    x, data, scale, zero, text, bias, other, act, dtype, *rows_of = node.args
    qtype, k, of = QType.parse(text), int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    launch, few = kernel("qpass_stored"), FEW[of]
    codes = constant(data)
    if qtype.bits <= 4 and codes.shape[1] == k:
        codes = packing.halved(codes)
    scales = constant(scale).detach().float().contiguous()
    zeros = None if zero is None else constant(zero).to(torch.uint8).contiguous()
    beta = None if bias is None else constant(bias).detach().float().contiguous()
    held = (codes.contiguous(), scales, zeros, beta)
    w, s, z, b = (0 if t is None else t.data_ptr() for t in held)
    n, group = codes.shape[0], qtype.group or k
    kind = (int(qtype.bits > 4), int(qtype.signed), ACTIVATIONS.index(act))
    many = _many_rows((w, s, z), (n, k, group, *kind), held, act, dtype)

    def run(x: Tensor, other: Tensor | None, x_scale=None, x_zero=None, *, held=held) -> Tensor:
        x = x.contiguous()
        rows, threads = x.numel() // k, torch.get_num_threads()
        if rows > few:
            return many(x, other, x_scale, x_zero)
        out = torch.empty((*x.shape[:-1], n), dtype=dtype)
        addend = added = row = low = each = 0
        if other is not None:
            other = other.contiguous()
            addend, added = other.data_ptr(), OUT_TYPES[other.dtype]
        if x_scale is not None:
            x_scale, x_zero = x_scale.contiguous(), x_zero.contiguous()
            row, low, each = x_scale.data_ptr(), x_zero.data_ptr(), int(x_scale.dim() > 0)
        pointers = (w, s, z, x.data_ptr(), b, addend, out.data_ptr(), row, low)
        launch(STORED.pack(*pointers, rows, n, k, group, *kind, OUT_TYPES[of], OUT_TYPES[dtype], added, each, threads))
        return out

    return run, (x, other, *rows_of)


def _many_rows(weight: tuple[int, ...], shape: tuple[int, ...], held: tuple, act: str, dtype: torch.dtype) -> Run:
    """Writes the weight out and multiplies by torch: in the input's dtype, of codes in that of the result.

    Codes less their zero point are whole numbers of 8 bits and a sign, exact in bfloat16 too; their scale comes after.
    """
    expand, function, (n, k), bias = kernel("qpass_expand"), activation(act), shape[:2], held[3]

    def run(x: Tensor, other: Tensor | None, x_scale: Tensor | None, x_zero: Tensor | None) -> Tensor:
        of = x.dtype if x_scale is None else dtype
        real = torch.empty((n, k), dtype=of)
        pointers = (*weight, 0, 0, 0, real.data_ptr(), 0, 0)
        expand(STORED.pack(*pointers, 0, *shape, 0, OUT_TYPES[of], 0, 0, torch.get_num_threads()))
        if x_scale is None or x_zero is None:
            y = functional.linear(x, real, None if bias is None else bias.to(of))
        else:
            y = functional.linear(x.to(of) - x_zero.to(of), real).float() * x_scale
            y = y if bias is None else y + bias
        return function(y if other is None else y + other).to(dtype)

    return run


CALLS = ((Q.stored_linear.default, stored_call),)
