"""The affine formula: everything that turns floats into codes and back is defined here, once.

    q  = clamp(round_half_even(x / scale) + zero, qmin, qmax)
    x' = (q - zero) * scale

and the scale of a range, which is first widened to include 0 (so that 0 is exact: padding, ReLU, masks)

    symmetric   scale = max(-lo, hi) / qmax
    asymmetric  scale = hi / n - lo / n,  n = qmax - qmin
                zero  = clamp(round_half_even(qmin - lo / scale), qmin, qmax)

(Jacob et al. 2018, arXiv 1712.05877, equation 1; two divisions by n keep the widest float32 range finite.)

1. A range that holds only 0 gets scale 1; any other scale is at least 2^-126, so that 1 / scale is finite.
2. Arithmetic is float32, float64 where x or the result is float64. Scales are float32 always.
3. A float type has no rounding of its own: x / scale is clamped and cast, which rounds half to even.
4. Values beyond the range saturate. A NaN or infinity poisons the scale that `choose_dynamic` makes, hence
   its whole row comes back not finite; it never becomes a plausible number.
5. No Python looks at a value or fixes a size, so all of it can be traced with symbolic shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.qparams import QParams
from qpass.qtype import QType, scale_shape

MIN_SCALE = torch.finfo(torch.float32).tiny


def limits(x: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of `x` under each scale, shaped as `scale_shape(qtype, x.shape)`."""
    scale_shape(qtype, x.shape)  # says what is wrong with the shape
    if qtype.granularity == "tensor":
        return x.amin(), x.amax()
    if qtype.granularity == "token":
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if qtype.granularity == "sample":
        rest = list(range(1, x.ndim))
        return (x.amin(rest, keepdim=True), x.amax(rest, keepdim=True)) if rest else (x, x)
    if qtype.group is not None:
        grouped = torch.unflatten(x, -1, (-1, qtype.group))
        return grouped.amin(-1), grouped.amax(-1)
    others = [axis for axis in range(x.ndim) if axis != qtype.axis]
    return (x.amin(others), x.amax(others)) if others else (x, x)


def choose_qparams(lo: Tensor, hi: Tensor, qtype: QType) -> QParams:
    """Scale and zero point for values between `lo` and `hi`, both shaped as the scale.

    >>> p = choose_qparams(torch.tensor(-1.0), torch.tensor(1.55), QType.parse("u8/t"))
    >>> round(p.scale.item(), 6), p.zero.item()
    (0.01, 100)
    """
    lo = lo.to(torch.float32).clamp(max=0.0)
    hi = hi.to(torch.float32).clamp(min=0.0)
    if qtype.symmetric:
        return QParams(_usable(torch.maximum(-lo, hi) / qtype.qmax, lo, hi), None, qtype)
    steps = qtype.qmax - qtype.qmin
    scale = _usable(hi / steps - lo / steps, lo, hi)
    zero = torch.round(qtype.qmin - lo / scale).clamp(qtype.qmin, qtype.qmax)
    return QParams(scale, zero.to(torch.int32), qtype)


def _usable(scale: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return torch.where(lo == hi, 1.0, scale.clamp(min=MIN_SCALE))


def choose_dynamic(x: Tensor, qtype: QType) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the values of `x` itself, at run time: `u8/token` gives each row its own."""
    params = choose_qparams(*limits(x, qtype), qtype)
    return params.scale * qtype.clip if qtype.clip != 1 else params.scale, params.zero


def expand(param: Tensor, qtype: QType, ndim: int) -> Tensor:
    """A scale or zero point of `qtype`, shaped to broadcast against its tensor of `ndim` axes."""
    if qtype.axis is not None:
        if qtype.axis >= ndim:
            raise QpassError(f"type {qtype} needs a tensor of at least {qtype.axis + 1} axes, got {ndim}.")
        return param.reshape([-1 if axis == qtype.axis else 1 for axis in range(ndim)])
    if qtype.group is not None:
        return param.unsqueeze(-1).expand(*param.shape, qtype.group).flatten(-2)
    return param


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, qtype: QType) -> Tensor:
    """Codes of `x`, in `qtype.storage` and the shape of `x`."""
    math = math_dtype(x.dtype)
    q = x.to(math) / expand(scale, qtype, x.ndim).to(math)
    if not qtype.is_float:
        q = torch.round(q)
    if zero is not None:
        q = q + expand(zero, qtype, x.ndim).to(math)
    return q.clamp(qtype.qmin, qtype.qmax).to(qtype.storage)


def dequantize(
    q: Tensor, scale: Tensor, zero: Tensor | None, qtype: QType, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values codes stand for, in `dtype` and the shape of `q`."""
    math = math_dtype(dtype)
    x = q.to(math)
    if zero is not None:
        x = x - expand(zero, qtype, q.ndim).to(math)
    return (x * expand(scale, qtype, q.ndim).to(math)).to(dtype)


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """`x` as it comes back from its codes, in the dtype of `x`."""
    q = quantize(x, qparams.scale, qparams.zero, qparams.type)
    return dequantize(q, qparams.scale, qparams.zero, qparams.type, x.dtype)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
