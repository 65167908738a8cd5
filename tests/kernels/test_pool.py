"""Max pooling in Triton's interpreter against the op's reference, and that against torch."""

import pytest
import torch
from torch.nn import functional

from qpass_kernels import pool
from tests.kernels.images import codes

GEOMETRIES = (  # batch, channels, rows, columns, kernel, stride, padding, dilation
    (1, 3, 9, 7, (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 16, 5, 9, (2, 2), (), (0, 0), (1, 1)),
    (1, 33, 7, 7, (3, 2), (2, 1), (1, 0), (1, 1)),
    (1, 48, 9, 9, (5, 5), (1, 1), (2, 2), (1, 1)),
    (1, 160, 5, 7, (1, 3), (1, 2), (0, 1), (1, 1)),
    (1, 16, 9, 9, (3, 3), (2, 3), (1, 1), (2, 2)),
)


def image(shape, dtype):
    return codes(*shape) if dtype == torch.int8 else torch.randn(shape).to(dtype)


def same_bits(found, expected):
    """Equal values and NaN, and equal strides."""
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    return torch.equal(found.float().nan_to_num(7e7), expected.float().nan_to_num(7e7))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", pool.TYPES)
def test_geometries(dtype, geometry, ceil_mode):
    shape, window = geometry[:4], geometry[4:]
    x = image(shape, dtype)
    found = pool.pool(x, pool.window_of(*map(list, window)), ceil_mode)
    expected = torch.ops.qpass_kernels.max_pool2d(x, *map(list, window), ceil_mode)
    assert same_bits(found, expected)
    kernel, stride, padding, dilation = window
    plain = functional.max_pool2d(x.double(), kernel, stride or None, padding, dilation, ceil_mode)
    assert torch.equal(expected.double(), plain)
    assert expected.is_contiguous(memory_format=torch.channels_last)


def test_all_smallest():
    x = torch.full((1, 16, 5, 5), -128, dtype=torch.int8)
    for run in (lambda *a: pool.pool(a[0], pool.window_of(*a[1:5]), a[5]), torch.ops.qpass_kernels.max_pool2d):
        assert (run(x, [3, 3], [2, 2], [1, 1], [1, 1], False) == -128).all()


def test_a_window_beside_the_image():
    x = codes(1, 16, 3, 3)
    args = [2, 2], [1, 1], [1, 1], [4, 4]
    expected = torch.ops.qpass_kernels.max_pool2d(x, *args, False)
    assert expected.shape == (1, 16, 1, 1)
    assert (expected == -128).all()
    assert same_bits(pool.pool(x, pool.window_of(*args), False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_infinities(dtype):
    x = torch.randn(1, 16, 7, 7).to(dtype)
    x[0, :, 3, 3], x[0, 1, 0, 0], x[0, 2] = float("nan"), float("inf"), float("-inf")
    args = [3, 3], [2, 2], [1, 1], [1, 1]
    expected = torch.ops.qpass_kernels.max_pool2d(x, *args, False)
    assert expected.isnan().any()
    assert same_bits(pool.pool(x, pool.window_of(*args), False), expected)


def test_nothing_to_do():
    args = [3, 3], [2, 2], [1, 1], [1, 1]
    x = codes(0, 16, 5, 5)
    assert pool.pool(x, pool.window_of(*args), False).shape == (0, 16, 3, 3)
    assert torch.ops.qpass_kernels.max_pool2d(x, *args, False).shape == (0, 16, 3, 3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_opcheck(dtype):
    args = image((1, 7, 5, 7), dtype), [3, 3], [2, 2], [1, 1], [1, 1], True
    torch.library.opcheck(torch.ops.qpass_kernels.max_pool2d.default, args)


BAD = (
    ({"x": codes(16, 5, 5)}, r"x must be \[B, C, H, W\] of torch.int8.*, not \(16, 5, 5\) torch.int8"),
    ({"x": codes(1, 16, 5, 5).int()}, "torch.int32"),
    ({"kernel": [3]}, r"kernel must be 2 numbers from 1 on, not \[3\]"),
    ({"stride": [0, 1]}, "stride must be 2 numbers from 1 on"),
    ({"padding": [2, 1]}, r"padding must be two numbers, at most half of the kernel \(1, 1\), not \(2, 1\)"),
    ({"padding": [1, 1, 1, 1]}, "padding must be two numbers"),
    ({"kernel": [9, 3]}, "does not fit on an image of 5 x 5"),
)


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says[:30] for _, says in BAD])
def test_bad_input(changes, says):
    fits = {"x": codes(1, 16, 5, 5), "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    x, *window = {**fits, **changes}.values()
    with pytest.raises(ValueError, match=f"max_pool2d: .*{says}"):
        pool.pool(x, pool.window_of(*window), False)
    with pytest.raises(ValueError, match=f"max_pool2d: .*{says}"):
        torch.ops.qpass_kernels.max_pool2d(x, *window, False)
