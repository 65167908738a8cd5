"""The ops of a quantized graph: schema, shape rule and reference, each written once.

A kernel of a backend may replace an op; it must agree with the reference here. The reference of `linear`
accumulates the integers in float64, where every sum of up to 2^53 / (255 * 127) products is exact, so it is the
exact int32 accumulator of the hardware followed by one rounding to float32.

`type` arguments are QTypes in their printed form (`u8/t`, `i8/c0`), so a graph's text says everything.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qpass import affine, packing
from qpass.qtype import QType, scale_shape

LIBRARY = torch.library.Library("qpass", "DEF")

ACTIVATIONS = (
    ("", lambda x: x),
    ("relu", functional.relu),
    ("gelu", functional.gelu),
    ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    ("silu", functional.silu),
    ("relu6", functional.relu6),
    ("hardswish", functional.hardswish),
    ("hardsigmoid", functional.hardsigmoid),
    ("sigmoid", torch.sigmoid),
)


def activation(name: str):
    """The function behind an activation's name in ACTIVATIONS."""
    return dict(ACTIVATIONS)[name]


POINTWISE: dict = {}  # ops that a generated kernel computes element by element, and their references


def define(schema: str, reference, fake, pointwise: bool = False) -> None:
    """Registers an op: its reference runs on every device, its fake gives shapes and dtypes."""
    tags = (torch.Tag.pt2_compliant_tag, *((torch.Tag.pointwise,) if pointwise else ()))
    name = LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpass::{name}", fake, lib=LIBRARY)
    if pointwise:
        POINTWISE[getattr(torch.ops.qpass, name.partition("(")[0].split("::")[-1]).default] = reference


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, type: str) -> Tensor:
    """Q = clamp(round(x / scale) + zero, qmin, qmax), contiguous in the type's storage dtype, shaped like x."""
    return affine.quantize(x, scale, zero, QType.parse(type)).contiguous()


def _quantize_fake(x, scale, zero, type):
    return torch.empty_like(x, dtype=QType.parse(type).storage, memory_format=torch.contiguous_format)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, type: str, dtype: torch.dtype) -> Tensor:
    """X = (q - zero) * scale in `dtype`, shaped and laid out like q."""
    return affine.dequantize(q, scale, zero, QType.parse(type), dtype)


def _dequantize_fake(q, scale, zero, type, dtype):
    return torch.empty_like(q, dtype=dtype)


def whole(data: Tensor, type: str) -> Tensor:
    """The codes [..., K], in the type's storage, of which data, uint8 [..., K / 2], holds two a byte."""
    return packing.whole(data, QType.parse(type))


def _whole_fake(data, type):
    return data.new_empty((*data.shape[:-1], data.shape[-1] * 2), dtype=QType.parse(type).storage)


def choose_qparams(x: Tensor, type: str) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of x at run time: per row [..., 1], per sample [B, 1, ...], or one in all.

    The zero point of a symmetric type is 0.
    """
    scale, zero = affine.choose_dynamic(x, QType.parse(type))
    return scale, torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero


def _choose_qparams_fake(x, type):
    shape = scale_shape(QType.parse(type), x.shape)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


def linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    x_type: str,
    weight: Tensor,
    weight_scale: Tensor,
    weight_type: str,
    bias: Tensor | None,
    other: Tensor | None,
    act: str,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    out_type: str,
    out_dtype: torch.dtype,
    weight_zero: Tensor | None = None,
) -> Tensor:
    """Y = act(dequantize(x) @ dequantize(weight).T + bias + other), quantized where out_type is not empty.

    x: [..., K], integers of x_type, or float where x_type is empty (weight-only). weight: codes [N, K] of
    weight_type, with zero points weight_zero shaped as its scale where the type is unsigned. bias: [N]. other: [..., N].
    Returns [..., N] in out_dtype, or in out_type's storage.
    """
    weight_qtype = QType.parse(weight_type)
    if (
        x_type
        and QType.parse(x_type).granularity in ("tensor", "token")
        and weight_qtype.granularity == "channel"
        and weight_zero is None
    ):
        y = _integer_linear(x, x_scale, x_zero, weight, weight_scale)
    else:
        real = affine.dequantize(x, x_scale, x_zero, QType.parse(x_type), torch.float32) if x_type else x
        y = functional.linear(real, affine.dequantize(weight, weight_scale, weight_zero, weight_qtype, real.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    if other is not None:
        y = y + other.to(y.dtype)
    y = activation(act)(y)
    if out_type:
        return affine.quantize(y, out_scale, out_zero, QType.parse(out_type))
    return y.to(out_dtype)


def _integer_linear(x, x_scale, x_zero, weight, weight_scale):
    wide = summing(x.device)
    centred = x.to(wide) if x_zero is None else x.to(wide) - x_zero
    accumulator = functional.linear(centred, weight.to(wide))
    return (accumulator * (x_scale.to(wide) * weight_scale.to(wide))).to(torch.float32)


def summing(device: torch.device) -> torch.dtype:
    """What a reference adds integers up in: float64 on CPU; float32 elsewhere, as GPUs are slow at float64 or have none.

    float32 is exact up to 2^24 and rounds beyond, and multiplies codes of 8 bits exactly, in TensorFloat-32 too.
    """
    return torch.float64 if device.type in ("cpu", "meta") else torch.float32


def _linear_fake(x, x_scale, x_zero, x_type, weight, weight_scale, weight_type, bias, other, act, out_scale,
                 out_zero, out_type, out_dtype, weight_zero=None):  # fmt: skip
    dtype = QType.parse(out_type).storage if out_type else out_dtype
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


OPS = (
    ("quantize(Tensor x, Tensor scale, Tensor? zero, str type) -> Tensor", quantize, _quantize_fake),
    (
        "dequantize(Tensor q, Tensor scale, Tensor? zero, str type, ScalarType dtype) -> Tensor",
        dequantize,
        _dequantize_fake,
    ),
    ("whole(Tensor data, str type) -> Tensor", whole, _whole_fake),
    ("choose_qparams(Tensor x, str type) -> (Tensor, Tensor)", choose_qparams, _choose_qparams_fake),
    (
        "linear(Tensor x, Tensor? x_scale, Tensor? x_zero, str x_type, Tensor weight, Tensor weight_scale, "
        "str weight_type, Tensor? bias, Tensor? other, str act, Tensor? out_scale, Tensor? out_zero, str out_type, "
        "ScalarType out_dtype, Tensor? weight_zero=None) -> Tensor",
        linear,
        _linear_fake,
    ),
)

for _schema, _reference, _fake in OPS:
    define(_schema, _reference, _fake)
