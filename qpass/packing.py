"""What a packed weight is: integers, their scale, and how the inputs are scaled to suit them.

    weight[n, k] = data[n, k] * scale[n] * in_mul[k]

`in_mul` is the per-channel factor that SmoothQuant (2211.10438, eq. 3) moves from activations to weights. It is kept
beside the integers, so that a packed weight always stands for the original one, and a pass moves it onto the
activation: linear(x, w * in_mul) = linear(x * in_mul, w).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.qtype import QType


@dataclass(frozen=True)
class Packed:
    """data: int8 shaped like the weight; scale: float32; in_mul: float32 [K] or None; the type names the axis."""

    data: Tensor
    scale: Tensor
    type: QType
    in_mul: Tensor | None = None

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        in_mul = None if self.in_mul is None else self.in_mul.to(device)
        return Packed(self.data.to(device), self.scale.to(device), self.type, in_mul)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales included."""
        return sum(t.nbytes for t in (self.data, self.scale, self.in_mul) if t is not None)
