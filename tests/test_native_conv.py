"""The native convolutions against the reference of their op, and that against torch's convolutions in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.backends.native.arguments import CONV_ACTIVATIONS
from qpass.backends.native.conv_ops import channels_last
from qpass.backends.native.conv_pack import pack_conv, phase_offsets, plain_weight, unpack_conv
from qpass.geometry import Geometry
from tests.test_native import needs_kernels, on_kernel

Q = torch.ops.qpass
OUTPUTS = (torch.float32, torch.bfloat16, torch.uint8)
OTHERS = (None, torch.float32, torch.bfloat16, torch.uint8)


def conv_arguments(
    x_shape, n, kernel, stride=1, padding=0, dilation=1, groups=1, transposed=False, extra=0, act="", dtype=torch.uint8,
    other=None, dynamic=False, x_zero=7, out_max=255,
):  # fmt: skip
    """Arguments of qpass.packed_conv; numbers stand for all axes."""
    batch, c, *spatial = x_shape
    axes = len(spatial)
    kernel, stride, padding, dilation, extra = (
        [v] * axes if isinstance(v, int) else list(v) for v in (kernel, stride, padding, dilation, extra)
    )
    shape = (c, n // groups, *kernel) if transposed else (n, c // groups, *kernel)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    extra = extra if transposed else [0] * axes
    g = Geometry(*map(tuple, (kernel, stride, padding, dilation)), transposed, tuple(extra), groups)
    packed, plain = pack_conv(weight, g), plain_weight(weight, g)
    assert torch.equal(unpack_conv(packed, c, n, g), plain)
    x = channels_last(torch.randint(0, 256, x_shape, dtype=torch.uint8))
    row = (batch, *[1] * (axes + 1))
    sample = (torch.rand(row) + 0.5, torch.randint(0, 256, row, dtype=torch.int32)) if dynamic else (None, None)
    offset = phase_offsets(plain, g) * (1 if dynamic else x_zero)
    alpha = (torch.rand(n) + 0.5) * 1e-3 / math.sqrt(plain[0].numel())
    slope = torch.rand(n) if act in ("prelu", "cap") else None
    args = [x, packed, alpha, torch.randn(n), offset, slope, *sample, None, 0.03, 99, n, kernel, stride, padding]
    args += [dilation, transposed, extra, groups, x_zero, act, 0.02, 61, out_max, dtype]
    if other is not None:
        out = Q.packed_conv.default(*args).shape
        value = torch.randint(0, 256, out, dtype=other) if other is torch.uint8 else torch.randn(out, dtype=other)
        args[8] = channels_last(value)
    return args


def compare(args):
    wanted, found = Q.packed_conv.default(*args), on_kernel(Q.packed_conv.default, *args)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.movedim(1, -1).is_contiguous()
    if found.dtype == torch.uint8:  # exact, but for values close to the edge of two codes
        near = 0.05 if args[20] in ("gelu", "silu", "sigmoid") else 2e-3  # short polynomials; float32 rounding
        real = Q.packed_conv.default(*args[:-1], torch.float32).double() / args[21]
        low, high = ((real + d).round().add(args[22]).clamp(0, args[23]) for d in (-near, near))
        assert bool(((found >= low) & (found <= high)).all())
    else:
        step = 1e-5 if found.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, wanted, rtol=step, atol=1e-5)


SHAPES = (
    {"x_shape": (1, 64, 7, 7), "n": 64, "kernel": 3, "padding": 1},
    {"x_shape": (2, 3, 17, 15), "n": 20, "kernel": 7, "stride": 2, "padding": 3},  # folded
    {"x_shape": (2, 3, 9, 11), "n": 5, "kernel": (2, 3), "padding": 2, "dilation": 2},  # folded, dilated
    {"x_shape": (1, 5, 6, 9), "n": 130, "kernel": 1},
    {"x_shape": (3, 70, 5, 4), "n": 33, "kernel": 1, "stride": 2, "padding": 1},
    {"x_shape": (2, 24, 19), "n": 40, "kernel": 5, "padding": 2, "stride": 3},
    {"x_shape": (2, 1, 30), "n": 9, "kernel": 4},
    {"x_shape": (1, 6, 4, 5, 6), "n": 17, "kernel": (3, 2, 3), "padding": (1, 0, 1), "stride": (1, 2, 1)},
    {"x_shape": (2, 16, 5, 6, 3), "n": 8, "kernel": 2, "dilation": (1, 2, 1)},
    {"x_shape": (2, 12, 9, 8), "n": 18, "kernel": 3, "padding": 1, "groups": 3},
    {"x_shape": (1, 8, 9, 8), "n": 16, "kernel": 3, "padding": 1, "groups": 8},
    {"x_shape": (2, 70, 9, 8), "n": 70, "kernel": 3, "padding": 1, "groups": 70},  # depthwise
    {"x_shape": (1, 32, 8, 8), "n": 32, "kernel": 5, "padding": 2, "stride": 2, "groups": 32},
    {"x_shape": (1, 130, 20), "n": 130, "kernel": 3, "padding": 2, "dilation": 2, "groups": 130},
    {"x_shape": (1, 5, 3, 4, 5), "n": 5, "kernel": 3, "padding": 1, "groups": 5},
    {"x_shape": (2, 20, 5, 6), "n": 17, "kernel": 4, "stride": 2, "padding": 1, "transposed": True},
    {"x_shape": (1, 6, 5, 6), "n": 9, "kernel": 2, "stride": 3, "transposed": True, "extra": 2, "groups": 3},
    {
        "x_shape": (2, 7, 9),
        "n": 5,
        "kernel": 5,
        "stride": 2,
        "padding": 2,
        "transposed": True,
        "extra": 1,
        "dilation": 3,
    },
    {"x_shape": (1, 9, 5, 6), "n": 9, "kernel": 3, "stride": 2, "padding": 1, "transposed": True, "groups": 9},
    {"x_shape": (0, 8, 5, 6), "n": 9, "kernel": 3, "padding": 1},
    {"x_shape": (2, 16, 1, 1), "n": 4, "kernel": 1},
    {"x_shape": (1, 512, 7, 7), "n": 200, "kernel": 3, "padding": 1},  # several tasks
    {"x_shape": (2, 20, 8, 7), "n": 20, "kernel": 3, "stride": 2, "padding": (0, 0, 1, 1), "groups": 20},  # uneven
    {"x_shape": (2, 3, 12, 11), "n": 9, "kernel": 3, "stride": 2, "padding": (0, 1, 1, 0)},
    {"x_shape": (1, 40, 9), "n": 24, "kernel": 4, "padding": (1, 2)},
)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())).replace(" ", ""))
@pytest.mark.parametrize("dynamic", [False, True])
def test_conv(shape, dynamic):
    for dtype in OUTPUTS:
        for other in OTHERS:
            compare(conv_arguments(**shape, dtype=dtype, other=other, dynamic=dynamic))


@needs_kernels
@pytest.mark.parametrize("act", CONV_ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 20])
def test_activations(act, groups):
    for dtype in OUTPUTS:
        for other in (None, torch.uint8):
            shape = {"x_shape": (2, 20, 6, 5), "n": 20, "kernel": 3, "padding": 1, "groups": groups}
            compare(conv_arguments(**shape, act=act, dtype=dtype, other=other, out_max=127))


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_conv(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    axes, groups = draw(1, 2, 3), draw(1, 1, 1, 2, 5)
    depthwise = draw(False, False, True)
    inputs, outputs = (1, 1) if depthwise else (draw(1, 2, 3, 4, 7, 16, 33), draw(1, 3, 16, 20, 65))
    groups = draw(2, 17, 64, 80) if depthwise else groups
    many = lambda *values: [draw(*values) for _ in range(axes)]
    kernel, stride, dilation = many(1, 2, 3, 5), many(1, 1, 2, 3), many(1, 1, 2)
    transposed = draw(False, False, True)
    extra = [draw(0, min(1, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)] if transposed else 0
    sides = 1 if transposed else draw(1, 2)
    padding = [draw(0, (k - 1) * d // 2) for k, d in [*zip(kernel, dilation, strict=True)] * sides]
    spatial = [max((k - 1) * d + 1, draw(1, 4, 7, 12)) for k, d in zip(kernel, dilation, strict=True)]
    compare(
        conv_arguments(
            (draw(1, 2, 3), groups * inputs, *spatial), groups * outputs, kernel, stride, padding, dilation, groups,
            transposed, extra, draw(*CONV_ACTIVATIONS), draw(*OUTPUTS), draw(*OTHERS),
            draw(False, True), draw(0, 7, 255), draw(127, 255),
        )
    )  # fmt: skip


@needs_kernels
def test_a_layout_of_its_own():
    """Inputs that do not lie channels-last are made so."""
    args = conv_arguments((2, 12, 6, 5), 20, 3, padding=1, other=torch.float32)
    wanted = on_kernel(Q.packed_conv.default, *args)
    args[0], args[8] = args[0].contiguous(), args[8].contiguous()
    assert torch.equal(on_kernel(Q.packed_conv.default, *args), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())).replace(" ", ""))
def test_reference(shape):
    """The op's reference is torch's convolution of the real numbers."""
    args = conv_arguments(**shape, dtype=torch.float32)
    x, packed, alpha, beta = args[:4]
    n, kernel, stride, padding, dilation, transposed, extra, groups, zero = args[11:20]
    g = Geometry(*map(tuple, (kernel, stride, padding, dilation)), transposed, tuple(extra), groups)
    weight = unpack_conv(packed, x.shape[1], n, g).double()
    if transposed:
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    axes = len(kernel)
    widths = [padding[side + axis] for axis in reversed(range(axes)) for side in (0, len(padding) - axes)]
    walk = (stride, [0] * axes if len(padding) > axes else padding, dilation, transposed, extra, groups)
    exact = x.double() - zero
    exact = torch.nn.functional.pad(exact, widths) if len(padding) > axes else exact
    exact = torch.ops.aten.convolution.default(exact, weight, None, *walk)
    along = (-1, *[1] * len(kernel))
    exact = exact * alpha.view(along).double() + beta.view(along).double()
    torch.testing.assert_close(Q.packed_conv.default(*args).double(), exact, rtol=1e-5, atol=1e-6)


def test_schema_and_fake():
    for shape in (SHAPES[0], SHAPES[15], SHAPES[5], SHAPES[-2]):
        torch.library.opcheck(Q.packed_conv.default, conv_arguments(**shape, dtype=torch.float32, dynamic=True))


@needs_kernels
@pytest.mark.parametrize("large", [1e6, 1e12, 1e30])
def test_what_an_int32_cannot_hold_is_clamped(large):
    """A residual or the scale of an image may be of any size: its codes are the last ones, never wrapped."""
    args = conv_arguments((2, 8, 5, 5), 40, 1, other=torch.bfloat16)
    args[8] = torch.full_like(args[8], large)
    args[8][:, ::2] = -large
    assert torch.equal(on_kernel(Q.packed_conv.default, *args), Q.packed_conv.default(*args))
    for groups in (1, 8):
        args = conv_arguments((2, 8, 5, 5), 8, 3, groups=groups, dynamic=True)
        args[3], args[6] = torch.zeros(8), torch.full_like(args[6], large)
        found, wanted = on_kernel(Q.packed_conv.default, *args), Q.packed_conv.default(*args)
        assert int((found.int() - wanted.int()).abs().max()) <= 1
