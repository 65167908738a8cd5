"""The gain of rounded weights: what a layer passes on of its weight's own output is all of it."""

import pytest
import torch

from qpass import affine
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers.gain import with_gain
from qpass.solvers.rtn import round_to_nearest
from qpass.solvers.steps import best_qparams


def share(weight, real, moments):
    """Of each output: how much of the weight's own output is in that of the rounded weight."""
    read = weight.double() @ moments
    return (read * real).sum(1) / (read * weight).sum(1)


@pytest.mark.parametrize("text", ["u2/g32", "i3/c0", "u4/g32", "i4/g16"])
def test_the_share_is_one(text):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(300, 64) @ torch.randn(64, 64)
    moments = (x.t() @ x).double() / 300
    params = best_qparams(weight, QType.parse(text))
    codes = affine.quantize(weight, params.scale, params.zero, params.type)
    before = share(weight, affine.dequantize(codes, params.scale, params.zero, params.type, torch.float64), moments)
    assert (before - 1).abs().max() > 0.01
    after = with_gain(weight, codes, params, moments)
    real = affine.dequantize(codes, after.scale, after.zero, after.type, torch.float64)
    torch.testing.assert_close(share(weight, real, moments), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("text", "shape"), [("u2/g32", (8, 64)), ("i4/c0", (8, 64)), ("i4/c1", (64, 8))])
def test_to_nearest_has_it_along_either_axis(text, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed = round_to_nearest(weight, QType.parse(text))
    real = affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
    axis = 0 if packed.type.axis == 1 else 1
    torch.testing.assert_close((real * weight).sum(axis), weight.square().sum(axis), rtol=1e-5, atol=0)


def test_what_is_left_alone():
    weight = torch.randn(4, 32)
    for text in ("i8/c0", "e4m3/c0"):
        params = (
            best_qparams(weight, QType.parse(text))
            if text != "e4m3/c0"
            else QParams(torch.ones(4), None, QType.parse(text))
        )
        codes = affine.quantize(weight, params.scale, params.zero, params.type)
        assert with_gain(weight, codes, params) is params
    zeros = torch.zeros(4, 32)
    packed = round_to_nearest(zeros, QType.parse("u4/g32"))
    assert torch.isfinite(packed.scale).all()
    assert not affine.dequantize(packed.data, packed.scale, packed.zero, packed.type).any()
