"""Comparing codes, scales and zero points of rows."""

import torch

from qpass import affine
from qpass.qtype import QType

BYTES = (torch.int8, torch.float8_e4m3fn)


def same(found, expected):
    """Equal values, NaN at the same places; e4m3's two zeros are equal."""
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a.float().nan_to_num(nan=1e9), b.float().nan_to_num(nan=1e9))


def near(found, expected):
    """The same but for last bits of a sum or an activation: one step of a code, or of a value, in less than 1 % of them.

    float32 values, scales among them, agree to 2e-6 of the largest; zero points to one step.
    """
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype == torch.float32:
            a, b = (v.nan_to_num(nan=1e30, posinf=2e30, neginf=-2e30) for v in (a, b))
            assert torch.allclose(a, b, rtol=2e-6, atol=2e-6 * float(b.abs().amax()) if b.numel() else 0.0)
        else:
            step = (ordered(a) - ordered(b)).abs()
            assert step.numel() == 0 or step.max() <= 1
            assert (step > 0).sum() <= max(0.01 * step.numel(), 1)


def ordered(value):
    """Integers ordered like values, neighbours one apart; NaN is above all."""
    if value.dtype in (torch.int8, torch.int32):
        return value.long()
    bits = value.contiguous().view(torch.int8 if value.dtype in BYTES else torch.int16).long()
    top = 2 ** (8 * value.element_size() - 1)
    return torch.where(value.float().isnan(), top, torch.where(bits < 0, -(bits + top), bits))


def by_affine(y, number):
    """(codes shifted to int8, scale, zero) of the rows of y under u8, i8 or e4m3, by the formula of qpass."""
    qtype = QType.parse(f"{number}/token")
    scale, zero = affine.choose_dynamic(y, qtype)
    codes = affine.quantize(y, scale, zero, qtype)
    if number != "u8":
        return codes, scale, torch.zeros_like(scale, dtype=torch.int32)
    return (codes.to(torch.int16) - 128).to(torch.int8), scale, zero - 128


def columns(k):
    """(mul, add) [k]."""
    return torch.rand(k) + 0.5, torch.randn(k)
