"""Fake quantization and its subgradients on whole tensors, each a function of tensors alone: what is traced into one kernel.

    forward    x, s, z      ->  y, code, q   code: int8, what the backward pass needs to know of an element of x
    backward   dL/dy, code  ->  dL/dx, and the sums dL/ds, dL/dz
    values     q, s, z      ->  y            q: the integers that y stands for, in one byte each

With channels x is multiplied and shifted before (channels.py), in the same kernel; code, s and z are then of what it becomes.

    code   -128: below, 127: above, else the residual v - round(v) in 1/240: one byte an element is kept beside y, which the
           product keeps anyway, or beside q, where x itself would take four

A weight is there in the backward pass, and so is what a ReLU made, which keeps it itself: of both x is what is seen, and no
code is kept. Arithmetic is float32, float64 where x is. y is (q - z) s to the last bit as `affine` defines it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.affine import math_dtype
from qpass.qat.blocks import blocked, spread, summed
from qpass.qat.channels import Channels, chained, scaled
from qpass.qat.subgradients.subgradient import Elements, Subgradient
from qpass.qtype import QType

BELOW, ABOVE, PARTS = -128, 127, 240


def forward(
    x: Tensor,
    step: Tensor,
    zero: Tensor | None,
    qtype: QType,
    dtype: torch.dtype,
    coded: bool,
    channels: Channels | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y in dtype, code or None, q or None). step, zero: float32 of the type's shape; zero holds whole numbers."""
    view = blocked(scaled(x, channels), qtype)
    s = spread(step, qtype, x.dim()).to(view.dtype)
    z = 0.0 if zero is None else spread(zero, qtype, x.dim()).to(view.dtype)
    exact = view / s
    near = torch.round(exact)
    q = (near + z).clamp(qtype.qmin, qtype.qmax)
    y = ((q - z) * s).to(dtype).reshape(x.shape)
    kept = q.to(qtype.storage).reshape(x.shape) if whole else None
    if not coded:
        return y, None, kept
    code = torch.round((exact - near) * PARTS)
    code = torch.where(exact + z <= qtype.qmin, BELOW, torch.where(exact + z >= qtype.qmax, ABOVE, code))
    return y, code.to(torch.int8).reshape(x.shape), kept


def values(q: Tensor, step: Tensor, zero: Tensor | None, qtype: QType, dtype: torch.dtype) -> Tensor:
    """Y in dtype, of what `forward` made of it."""
    view = blocked(q, qtype).to(math_dtype(dtype))
    s = spread(step, qtype, q.dim()).to(view.dtype)
    z = 0.0 if zero is None else spread(zero, qtype, q.dim()).to(view.dtype)
    return ((view - z) * s).to(dtype).reshape(q.shape)


def backward(
    grad: Tensor,
    seen: Tensor,
    step: Tensor,
    zero: Tensor | None,
    qtype: QType,
    rule: Subgradient,
    dtype: torch.dtype,
    channels: Channels | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dL/dx in dtype, dL/ds, dL/dz), the last two summed and None where the rule learns none. seen: code, or x itself."""
    g = blocked(grad, qtype).to(math_dtype(dtype))
    s = spread(step, qtype, seen.dim()).to(g.dtype)
    z = torch.zeros((), dtype=g.dtype, device=g.device)
    z = z if zero is None else spread(zero, qtype, seen.dim()).to(g.dtype)
    if seen.dtype == torch.int8:
        held = blocked(seen, qtype).to(g.dtype)  # compared as floats too: a kernel has one width of lanes
        residual, below, above = held * (1 / PARTS), held == BELOW, held == ABOVE
    else:
        exact = blocked(scaled(seen, channels), qtype) / s
        residual, below, above = exact - torch.round(exact), exact + z <= qtype.qmin, exact + z >= qtype.qmax
    e = Elements(g, residual, below, above, s, qtype.qmin - z, qtype.qmax - z)
    to_step = None if rule.to_step is None else summed(rule.to_step(e), qtype)
    to_offset = None if rule.to_offset is None or zero is None else summed(rule.to_offset(e), qtype)
    to_x = chained(rule.to_value(e).reshape(seen.shape), channels)
    return to_x.to(dtype), to_step, to_offset


def gradient_scale(values: int, steps: int, qtype: QType) -> float:
    """What the gradient of each of so many steps is multiplied by: 1 / sqrt(N high) with its N values, 1 without any."""
    return (values / steps * qtype.qmax) ** -0.5 if values else 1.0
