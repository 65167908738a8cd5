"""Native pooling against the reference of its op, and that against torch's pooling of the real numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.backends.native.images import channels_last
from qpass.backends.native.pool_ops import MAXIMA, MEANS
from tests.test_native import needs_kernels, on_kernel

Q = torch.ops.qpass
SHAPES = (
    # x, kernel, stride, padding, dilation
    ((1, 64, 12, 12), [3, 3], [2, 2], [1, 1], [1, 1]),
    ((2, 70, 7, 5), [7, 5], [], [0, 0], [1, 1]),  # all of the image
    ((3, 5, 9, 11), [3, 2], [2, 3], [1, 1], [1, 1]),
    ((1, 130, 10), [4], [3], [2], [1]),
    ((2, 17, 5, 6, 7), [2, 3, 2], [1, 2, 2], [1, 1, 0], [1, 1, 1]),
    ((1, 20, 9, 9), [3, 3], [1, 1], [1, 1], [2, 2]),
    ((0, 8, 5, 5), [2, 2], [2, 2], [0, 0], [1, 1]),
)


def compare(args):
    wanted, found = Q.packed_pool.default(*args), on_kernel(Q.packed_pool.default, *args)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.movedim(1, -1).is_contiguous()
    if args[1] == "max":
        assert torch.equal(found, wanted)
    elif found.dtype == torch.uint8:  # exact, but for values within float32 rounding of the edge of two codes
        real = Q.packed_pool.default(*args[:-1], torch.float32).double()
        assert all(bool(ok.all()) for ok in (found >= (real - 1e-4).round().clamp(0, 255),
                                             found <= (real + 1e-4).round().clamp(0, 255)))  # fmt: skip
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5 if found.dtype == torch.float32 else 2**-7, atol=1e-5)


def codes(shape):
    return channels_last(torch.randint(0, 256, shape, dtype=torch.uint8))


@needs_kernels
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation"), SHAPES)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pool(shape, kernel, stride, padding, dilation, ceil_mode):
    tail = (kernel, stride, padding, dilation, ceil_mode)
    compare((codes(shape), "max", *tail, False, 0, 1.0, 0.0, torch.uint8))
    for include in (False, True) if max(dilation) == 1 else ():
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            compare((codes(shape), "mean", *tail, include, 99, 0.9, 3.0, dtype))
        compare((codes(shape), "mean", *tail, include, 99, 1.0, 0.0, torch.uint8))


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_pool(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    axes, kind = draw(1, 2, 3), draw("max", "mean")
    kernel = [draw(1, 2, 3, 5) for _ in range(axes)]
    stride, padding = [draw(1, 2, 3) for _ in range(axes)], [draw(0, k // 2) for k in kernel]
    dilation = [draw(1, 2) if kind == "max" else 1 for _ in range(axes)]
    spatial = [max((k - 1) * d + 1, draw(3, 8)) for k, d in zip(kernel, dilation, strict=True)]
    dtype = torch.uint8 if kind == "max" else draw(torch.float32, torch.uint8)
    x = codes((draw(1, 3), draw(1, 16, 65), *spatial))
    args = (kernel, stride, padding, dilation, draw(False, True), draw(False, True), draw(0, 255))
    compare((x, kind, *args, draw(1.0, 0.7), draw(0.0, 10.5), dtype))


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation"), SHAPES)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_reference(shape, kernel, stride, padding, dilation, ceil_mode):
    """Codes of a zero point pool as the real numbers do, whose padding is 0; and the shapes are torch's."""
    x, axes, zero, scale = codes(shape), len(kernel), 99, 0.25
    tail = (kernel, stride, padding, dilation, ceil_mode)
    found = Q.packed_pool.default(x, "max", *tail, False, 0, 1.0, 0.0, torch.uint8)
    real = (x.double() - zero) * scale
    assert torch.equal((found.double() - zero) * scale, MAXIMA[axes](real, kernel, stride or kernel, *tail[2:]))
    for include in (False, True) if max(dilation) == 1 else ():
        found = Q.packed_pool.default(x, "mean", *tail, include, zero, scale, -zero * scale, torch.float32)
        exact = MEANS[axes](real, kernel, stride or kernel, padding, ceil_mode, include)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_schema_and_fake():
    for kind, dtype in (("max", torch.uint8), ("mean", torch.float32)):
        args = (codes((2, 5, 9, 8)), kind, [3, 3], [2, 2], [1, 1], [1, 1], True, True, 7, 0.5, 1.0, dtype)
        torch.library.opcheck(Q.packed_pool.default, args)
