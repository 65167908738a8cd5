"""What a packed weight is: integers, their scale, and how the inputs are scaled to suit them.

    weight[n, k] = (data[n, k] - zero[n]) * scale[n] * in_mul[k]            channels
    weight[n, k] = (data[n, k] - zero[n, g]) * scale[n, g] * in_mul[k]      groups of G, g = k // G

Where it is kept (a model's buffers, a file) two codes of 4 bits and fewer share a byte: `halved`, `whole`. A nested weight
is kept as several of these (nested.py).

A symmetric type has no zero point. `in_mul` is the per-channel factor that SmoothQuant (2211.10438, eq. 3) moves from
activations to weights. It is kept beside the integers, so that a packed weight always stands for the original one, and
a pass moves it onto the activation: linear(x, w * in_mul) = linear(x * in_mul, w).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.qtype import QType


@dataclass(frozen=True)
class Packed:
    """A weight as it is kept; a model's buffers are these tensors themselves, so a plan beside its model costs nothing.

    stored: the codes, int8, or uint8 where the type is unsigned, shaped like the weight; two codes a byte where `halves`;
    planes, uint8 [P, N, K / 4], of a nested one. scale: float32, and stored_zero: uint8 or None, as scale_shape says of the
    type, of a nested one for each width; in_mul: float32 [K] or None, K the channels of the input. `data` and `zero` (int32)
    are made when they are asked for.
    """

    stored: Tensor
    scale: Tensor
    type: QType
    in_mul: Tensor | None = None
    stored_zero: Tensor | None = None
    halves: bool = False

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        tensors = (self.stored, self.scale, self.in_mul, self.stored_zero)
        stored, scale, in_mul, zero = (None if t is None else t.to(device) for t in tensors)
        return Packed(stored, scale, self.type, in_mul, zero, self.halves)

    @property
    def data(self) -> Tensor:
        """One code an element, shaped like the weight."""
        return whole(self.stored, self.type) if self.halves else self.stored

    @property
    def zero(self) -> Tensor | None:
        """int32, shaped like the scale."""
        return None if self.stored_zero is None else self.stored_zero.to(torch.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        if self.type.widths:
            shape = self.stored.shape[1], 4 * self.stored.shape[2]
            return shape[::-1] if self.type.axis == 1 else shape
        return (*self.stored.shape[:-1], 2 * self.stored.shape[-1]) if self.halves else tuple(self.stored.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales included."""
        return sum(t.nbytes for t in (self.stored, self.scale, self.stored_zero, self.in_mul) if t is not None)


def pack(data: Tensor, scale: Tensor, qtype: QType, in_mul: Tensor | None = None, zero: Tensor | None = None) -> Packed:
    """A weight of codes, one an element; zero: int32 or uint8, or None where the type is symmetric."""
    stored_zero = None if zero is None else zero.to(torch.uint8)
    by_halves = halves(data, qtype)
    return Packed(halved(data) if by_halves else data, scale, qtype, in_mul, stored_zero, by_halves)


def halves(codes: Tensor, qtype: QType) -> bool:
    """Whether codes of a type are kept as two a byte: a matrix of at most 4 bits with an even number of columns."""
    return codes.dim() == 2 and not qtype.is_float and qtype.bits <= 4 and codes.shape[1] % 2 == 0


def halved(codes: Tensor) -> Tensor:
    """uint8 [..., K / 2] of codes [..., K] of at most 4 bits: the even columns are the lower half of each byte."""
    low, high = (codes[..., i::2].to(torch.uint8) & 15 for i in (0, 1))
    return low | (high << 4)


def whole(data: Tensor, qtype: QType) -> Tensor:
    """The codes [..., K], in the type's storage, that `halved` put into uint8 [..., K / 2]."""
    codes = torch.stack([data & 15, data >> 4], -1).flatten(-2)
    if not qtype.signed:
        return codes
    return ((codes ^ 8).to(torch.int8)) - 8  # the sign of 4 bits


def spread(factor: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """A factor [C] of input channels, shaped to multiply the weight of a convolution that reads them.

    weight: [N, C / groups, *kernel] or, transposed, [C, N / groups, *kernel]. Returns [1 or N, C / groups, 1, ...] or
    [C, 1, 1, ...].
    """
    ones = [1] * (weight.dim() - 2)
    if transposed:
        return factor.reshape(-1, 1, *ones)
    groups = len(factor) // weight.shape[1]
    if groups == 1:
        return factor.reshape(1, -1, *ones)
    rows = factor.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape(*rows.shape, *ones)


def gathered(shaped: Tensor, groups: int, transposed: bool) -> Tensor:
    """The factor [C] that `spread` shaped."""
    if transposed or shaped.shape[0] == 1:
        return shaped.flatten()
    return shaped.reshape(groups, -1, shaped.shape[1])[:, 0].flatten()
