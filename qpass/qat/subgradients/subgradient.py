"""What a rule of subgradients is: how dL/dy of a fake-quantized value reaches the value, its step and its offset.

    v = x / s,   q = clamp(round_half_even(v) + z, low, high),   y = (q - z) s

Rounding has a derivative of 0 almost everywhere; each rule says what is used in its stead. An element is `below` where
v + z <= low, `above` where v + z >= high, else inside; its residual is r = v - round(v), of -1/2 .. 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.qparams import QParams
from qpass.qtype import QType


@dataclass(frozen=True)
class Elements:
    """One element each of a fake-quantized value, or what broadcasts to it: all in one floating dtype but the masks.

    grad: dL/dy; residual: r, anything outside; low, high: the codes of the type, minus z: what q - z is below and above.
    """

    grad: Tensor
    residual: Tensor
    below: Tensor
    above: Tensor
    step: Tensor
    low: Tensor
    high: Tensor

    @property
    def inside(self) -> Tensor:
        """Where the value is not clipped."""
        return ~(self.below | self.above)


Summand = Callable[[Elements], Tensor]


@dataclass(frozen=True)
class Subgradient:
    """One rule. to_value: dL/dx of each element. to_step, to_offset: what each adds to dL/ds, dL/dz; None: not learned.

    start: the published first parameters of values of a type; None: those of the plan alone.
    """

    name: str
    to_value: Summand
    to_step: Summand | None = None
    to_offset: Summand | None = None
    start: Callable[[Tensor, QType], QParams] | None = None

    @property
    def learns(self) -> bool:
        """Whether the step is a parameter of the training, or follows the range of the values."""
        return self.to_step is not None


def clipped(e: Elements) -> Tensor:
    """dL/dy inside, 0 outside."""
    return torch.where(e.inside, e.grad, 0.0)
