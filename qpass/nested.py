"""Nested weights: one packed weight that can be read at several widths, u{8,4,2}/g128 say.

    4 bits     w4 = s4 (h - z4)          h: 4 bits, as they are rounded for 4 bits alone
    8 bits     w8 = w4 + s8 (l - z8)     l: 4 bits more, of what h leaves of the weight
    2 bits     w2 = s2 (q - z2)          q: 2 bits of their own

The code of 8 bits is 16 h + l: its upper bits are the good code of 4. The step s8 is fitted, and more than s4 / 16: a solver
rounds weights away from their nearest code to make up for others, so what is left is wider than a cell. Codes of 2 bits that
are the upper bits of good ones of 4 are bad ones (docs/decisions/0010-nested-weights.md), so they lie beside.

    stored     uint8 [P, N, K / 4]       h: 2 of P, as [N, K / 2] of two codes a byte (packing.halved);  l: 2;  q: 1
    scale      float32 [W, N] or [W, N, G], zero: uint8, a row for each width

Of q, byte i of a row holds in its bits 0, 1, 4, 5 what byte i of `halved` codes holds, and in the others byte i + K / 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qpass import affine
from qpass.nested_words import HALF
from qpass.packing import Packed, halved, whole
from qpass.qtype import QType

PAIRS = 0x33  # the lower two bits of each half of a byte
FEW = 2


def type_at(qtype: QType, bits: int) -> QType:
    """The type of the ordinary weight that a nested one is at a width, u4 for 8 bits: of what 4 bits leave."""
    axis = None if qtype.axis is None else 0
    return dataclasses.replace(qtype, bits=min(bits, HALF), widths=(), axis=axis)


def quartered(codes: Tensor) -> Tensor:
    """uint8 [N, K / 4] of codes [N, K] of 2 bits."""
    first, second = halved(codes).chunk(2, 1)
    return first | (second << FEW)


def unquartered(data: Tensor) -> Tensor:
    """uint8 [N, K / 2], two codes a byte, of what `quartered` put into [N, K / 4]."""
    return torch.cat([data & PAIRS, (data >> FEW) & PAIRS], -1)


def plane(stored: Tensor, qtype: QType, bits: int) -> Tensor:
    """Of 4 bits the upper, of 8 the lower halves, uint8 [N, K / 2], two codes a byte; of 2 bits uint8 [N, K / 4]: a view."""
    if bits == FEW:
        return stored[-1]
    first = 2 * int(bits > HALF)
    return stored[first : first + 2].reshape(stored.shape[1], -1)


def dequantized(
    stored: Tensor, scale: Tensor, zero: Tensor, qtype: QType, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight [N, K] at a width, in `dtype`; [K, N] where the type's channels are on axis 1."""
    math = affine.math_dtype(dtype)

    def part(width: int) -> Tensor:
        data, at, kind = plane(stored, qtype, width), qtype.widths.index(width), type_at(qtype, width)
        codes = whole(unquartered(data) if width == FEW else data, kind)
        return affine.dequantize(codes, scale[at], zero[at], kind, math)

    weight = (part(bits) if bits <= HALF else part(HALF) + part(bits)).to(dtype)
    return weight.t().contiguous() if qtype.axis == 1 else weight


def joined(parts: Mapping[int, Packed], qtype: QType) -> Packed:
    """A nested weight of ordinary ones [N, K]: of u4 and of u2, and for 8 bits of the u4 of what 4 bits leave."""
    halves = [_unsigned(parts[bits]) for bits in qtype.widths]
    planes = [halved(halves[qtype.widths.index(bits)][0]) for bits in (HALF, 8) if bits in parts]
    quarters = [plane.reshape(2, len(plane), -1) for plane in planes]
    if FEW in parts:
        quarters.append(quartered(halves[-1][0]).unsqueeze(0))
    scale = torch.stack([parts[bits].scale for bits in qtype.widths])
    return Packed(torch.cat(quarters), scale, qtype, None, torch.stack([zero for _, zero in halves]))


def _unsigned(packed: Packed) -> tuple[Tensor, Tensor]:
    """(codes, zero points), uint8: a symmetric type's are moved by half of its levels."""
    if packed.zero is not None:
        return packed.data, packed.zero.to(torch.uint8)
    middle = 2 ** (packed.type.bits - 1)
    return (packed.data + middle).to(torch.uint8), torch.full_like(packed.scale, middle, dtype=torch.uint8)


def real_weight(packed: Packed, bits: int | None = None) -> Tensor:
    """Float32: what a packed weight stands for without in_mul. bits: of a nested one, the most unless given."""
    if packed.type.widths:
        return dequantized(packed.stored, packed.scale, packed.stored_zero, packed.type, bits or packed.type.bits)
    return affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
