"""The ops of nested weights, and the width that they are read at: chosen when they run, by model or by request.

A nested weight has a tensor `bits` beside its planes. `using` overrides it for what runs inside, in this thread or task
alone: others that call the same model at the same time are not disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional

from qpass.nested import dequantized
from qpass.ops import define
from qpass.qtype import QType

_REQUESTED: ContextVar[Mapping[int, int] | None] = ContextVar("bits", default=None)  # address of `bits` -> what to read


@contextmanager
def using(requested: Mapping[int, int]) -> Iterator[None]:
    """Within it the weights whose `bits` lie at these addresses are read at other widths."""
    token = _REQUESTED.set({**(_REQUESTED.get() or {}), **requested})
    try:
        yield
    finally:
        _REQUESTED.reset(token)


def bits_now(bits: Tensor) -> int:
    """The width to read: what the request asks for, else what the model is set to."""
    requested = _REQUESTED.get()
    if requested and (found := requested.get(bits.data_ptr())) is not None:
        return found
    return int(bits)


def nested(planes: Tensor, scale: Tensor, zero: Tensor, bits: Tensor, type: str, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, at the width of now. planes: uint8 [P, N, K / 4]; scale: float32, zero: uint8, [W, N] or
    [W, N, G]; bits: int64 [].
    """
    return dequantized(planes, scale, zero, QType.parse(type), bits_now(bits), dtype)


def _shape(planes: Tensor, type: str) -> tuple[int, ...]:
    shape = (planes.shape[1], planes.shape[2] * 4)
    return shape[::-1] if QType.parse(type).axis == 1 else shape


def _nested_fake(planes, scale, zero, bits, type, dtype):
    return planes.new_empty(_shape(planes, type), dtype=dtype)


def nested_linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: Tensor,
    type: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Y = x @ w.T + bias, [..., N] in `dtype`: w [N, K] as `nested` gives it, in x's dtype. x: float [..., K]; bias: [N]."""
    by_rows = QType.parse(type.replace("/c1", "/c0"))
    y = functional.linear(x, dequantized(planes, scale, zero, by_rows, bits_now(bits), x.dtype))
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


def nested_linear_fake(x, planes, scale, zero, bits, type, bias, dtype):
    return x.new_empty((*x.shape[:-1], planes.shape[1]), dtype=dtype)


OPS = (
    (
        "nested(Tensor planes, Tensor scale, Tensor zero, Tensor bits, str type, ScalarType dtype) -> Tensor",
        nested,
        _nested_fake,
    ),
    (
        "nested_linear(Tensor x, Tensor planes, Tensor scale, Tensor zero, Tensor bits, str type, Tensor? bias, "
        "ScalarType dtype) -> Tensor",
        nested_linear,
        nested_linear_fake,
    ),
)

for _schema, _reference, _fake in OPS:
    define(_schema, _reference, _fake)
