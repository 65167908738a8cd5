"""qpass.conv against a float64 convolution of what its integers stand for; shapes told are the shapes made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from qpass import affine
from qpass.conv_ops import channel_scales, conv_shape
from qpass.ops import ACTIVATIONS
from qpass.qtype import QType

aten = torch.ops.aten
Q = torch.ops.qpass
QUICK = settings(max_examples=60, deadline=None)


@st.composite
def walks(draw):
    """(sizes of x, shape of weight, stride, padding, dilation, transposed, output padding, groups) that fit."""
    axes, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    small = lambda low, high: [draw(st.integers(low, high)) for _ in range(axes)]
    kernel, stride, dilation = small(1, 3), small(1, 3), small(1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [draw(st.integers(0, r)) for r in reach]
    groups, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    c, n = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    more = [0] * axes
    if transposed:
        more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        sizes = [draw(st.integers(1, 4)) + 2 * p for p in padding]
    else:
        sizes = [r + draw(st.integers(1, 5)) for r in reach]
    weight = (c, n // groups, *kernel) if transposed else (n, c // groups, *kernel)
    return (batch, c, *sizes), weight, stride, padding, dilation, transposed, more, groups


def arguments(walk, sample, seed):
    """x, its parameters and type, w, its scale and type."""
    shape, weight, _, _, _, transposed, _, _ = walk
    g = torch.Generator().manual_seed(seed)
    params = (shape[0], *[1] * (len(shape) - 1)) if sample else ()
    x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    xs = 0.01 + torch.rand(params, generator=g)
    xz = torch.randint(0, 256, params, generator=g, dtype=torch.int32)
    w = torch.randint(-127, 128, weight, generator=g, dtype=torch.int8)
    axis = 1 if transposed else 0
    ws = 0.001 + torch.rand(weight[axis], generator=g) / 100
    return x, xs, xz, "u8/sample" if sample else "u8/t", w, ws, f"i8/c{axis}"


def wanted(given, walk, bias, other, act):
    """All of it in float64."""
    x, xs, xz, xt, w, ws, wt = given
    real = affine.dequantize(x, xs, xz, QType.parse(xt), torch.float64)
    weight = affine.dequantize(w, ws, None, QType.parse(wt), torch.float64)
    y = aten.convolution(real, weight, None if bias is None else bias.double(), *walk[2:])
    y = y if other is None else y + other.double()
    return dict(ACTIVATIONS)[act](y)


@QUICK
@given(
    walks(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([a for a, _ in ACTIVATIONS]),
    st.integers(0, 999),
)
def test_against_float64(walk, sample, with_bias, with_other, act, seed):
    given = arguments(walk, sample, seed)
    shape = conv_shape(walk[0], walk[1], *walk[2:])
    bias = torch.randn(shape[1]) if with_bias else None
    other = torch.randn(shape) if with_other else None
    full = wanted(given, walk, bias, other, act)
    rest = (bias, other, None, None, "", act, None)
    found = Q.conv(*given, *rest, None, None, "", torch.float32, *walk[2:])
    assert list(found.shape) == shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), full, rtol=1e-5, atol=1e-5 * float(full.abs().max().clamp(min=1)))
    params = affine.choose_qparams(full.amin(), full.amax(), QType.parse("u8/t"))
    codes = Q.conv(*given, *rest, params.scale, params.zero, "u8/t", torch.float32, *walk[2:])
    exact = affine.quantize(full, params.scale, params.zero, params.type)
    assert int((codes.int() - exact.int()).abs().max()) <= 1  # a value on the edge of two codes


@QUICK
@given(walks(), st.booleans(), st.sampled_from(["", "u8/t"]))
def test_shapes(walk, sample, out_type):
    given = arguments(walk, sample, 0)
    out = (torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)) if out_type else (None, None)

    def call(x, xs, xz, w, ws, *out):
        none = (None, None, None, None, "", "relu", None)
        return Q.conv(x, xs, xz, given[3], w, ws, given[6], *none, *out, out_type, torch.bfloat16, *walk[2:])

    tensors = [*given[:3], *given[4:6], *out]
    real = call(*tensors)
    with FakeTensorMode() as mode:
        fake = call(*(None if t is None else mode.from_tensor(t) for t in tensors))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_padding_is_an_exact_zero():
    """Zeros in, zeros out, whatever the zero point."""
    x = torch.full((1, 2, 4, 4), 77, dtype=torch.uint8)
    given = (x, torch.tensor(0.3), torch.tensor(77, dtype=torch.int32), "u8/t")
    w = torch.randint(-127, 128, (3, 2, 3, 3), dtype=torch.int8)
    rest = (
        None,
        None,
        None,
        None,
        "",
        "",
        None,
        None,
        None,
        "",
        torch.float32,
        [1, 1],
        [2, 2],
        [1, 1],
        False,
        [0, 0],
        1,
    )
    y = Q.conv(*given, w, torch.rand(3), "i8/c0", *rest)
    assert y.shape == (1, 3, 6, 6)
    assert not y.any()


def test_the_widest_accumulator_is_exact():
    """Every product at its largest: 4608 of them, more than float32 holds exactly."""
    x = torch.full((1, 512, 3, 3), 255, dtype=torch.uint8)
    w = torch.full((1, 512, 3, 3), 127, dtype=torch.int8)
    w[0, 0, 0, 0] = 126
    none = (
        None,
        None,
        None,
        None,
        "",
        "",
        None,
        None,
        None,
        "",
        torch.float32,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
    )
    y = Q.conv(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), "u8/t", w, torch.ones(1), "i8/c0", *none)
    assert float(y) == float(torch.tensor(255 * (127 * 4608 - 1), dtype=torch.float32))


def test_residuals_and_prelu():
    walk = ((2, 3, 5, 6), (4, 3, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    given = arguments(walk, False, 1)
    slope, scale, zero = torch.rand(4), torch.tensor(0.05), torch.tensor(9, dtype=torch.int32)
    other = torch.randint(0, 256, (2, 4, 5, 6), dtype=torch.uint8)
    real = affine.dequantize(other, scale, zero, QType.parse("u8/t"))
    found = Q.conv(*given, None, other, scale, zero, "u8/t", "prelu", slope, None, None, "", torch.float32, *walk[2:])
    full = F.prelu(wanted(given, walk, None, real, ""), slope.double())
    torch.testing.assert_close(found.double(), full, rtol=1e-5, atol=1e-4)


@QUICK
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.booleans())
def test_the_largest_code_is_the_code_of_the_largest(axes, kernel, dilation, stride, padded, ceil):
    padding = [kernel // 2 if padded else 0] * axes
    walk = ([kernel] * axes, [stride] * axes, padding, [dilation] * axes, ceil)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
    x = torch.randn(2, 3, *(7, 6, 8)[:axes])
    scale, zero, qtype = torch.tensor(0.02), torch.tensor(100, dtype=torch.int32), QType.parse("u8/t")
    q = affine.quantize(x, scale, zero, qtype)
    found = Q.max_pool(q, *walk)
    assert torch.equal(found, affine.quantize(pool(x, *walk), scale, zero, qtype))
    with FakeTensorMode() as mode:
        assert Q.max_pool(mode.from_tensor(q), *walk).shape == found.shape


@pytest.mark.parametrize(
    ("scale", "channels"),
    [(torch.tensor(2.0), 4), (torch.tensor([1.0, 2.0, 3.0, 4.0]), 4), (torch.tensor([1.0, 2.0]), 6)],
)
def test_scales_of_channels(scale, channels):
    found = channel_scales(scale, channels)
    assert found.shape == (channels,)
    assert torch.equal(found[: scale.numel()], scale.reshape(-1))
