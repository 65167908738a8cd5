"""QParams: the scale and zero point tensors that belong to one QType, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.qtype import QType


@dataclass(frozen=True, eq=False)
class QParams:
    """Scale and zero point of one quantized tensor, shaped as `scale_shape` says.

    scale float32; zero int32, or None where the type is symmetric. Building one looks at no value, so it can
    be traced; `check` looks.
    """

    scale: Tensor
    zero: Tensor | None
    type: QType

    def to(self, device: torch.device | str) -> QParams:
        """The same parameters on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return QParams(self.scale.to(device), zero, self.type)

    def check(self, where: str = "") -> QParams:
        """Self, if it can be used; else a QpassError that begins with `where` (a site or weight name)."""
        why = _dtype_fault(self) or _value_fault(self)
        if why:
            raise QpassError(f"{where or 'quantization parameters'} ({self.type}): {why}.")
        return self


def _dtype_fault(p: QParams) -> str | None:
    if p.scale.dtype != torch.float32:
        return f"scale must be float32, not {p.scale.dtype}"
    if (p.zero is None) != p.type.symmetric:
        return "a symmetric type has no zero point" if p.type.symmetric else "an unsigned type needs a zero point"
    if p.zero is None:
        return None
    if p.zero.dtype != torch.int32:
        return f"zero must be int32, not {p.zero.dtype}"
    if p.zero.shape != p.scale.shape:
        return f"zero has shape {tuple(p.zero.shape)}, scale {tuple(p.scale.shape)}; they must be equal"
    return None


def _value_fault(p: QParams) -> str | None:
    bad = ~(torch.isfinite(p.scale) & (p.scale > 0))
    if bad.any():
        first = p.scale[bad].flatten()[0].item()
        return f"{int(bad.sum())} of {p.scale.numel()} scales are not finite and positive (the first is {first})"
    if p.zero is not None and ((p.zero < p.type.qmin) | (p.zero > p.type.qmax)).any():
        return f"zero points must lie in {p.type.qmin}..{p.type.qmax}"
    return None
