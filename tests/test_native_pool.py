"""The native max pool against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from qpass.backends.native.conv_ops import channels_last
from tests.test_native import needs_kernels, on_kernel

Q = torch.ops.qpass
POOLS = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)


def compare(x, size, stride, padding, dilation, ceil_mode):
    wanted = POOLS[x.dim() - 3](x.double(), size, stride or size, padding, dilation, ceil_mode).to(torch.uint8)
    found = on_kernel(Q.packed_max_pool.default, channels_last(x), size, stride, padding, dilation, ceil_mode)
    assert torch.equal(found, wanted)
    assert found.movedim(1, -1).is_contiguous()


@needs_kernels
@pytest.mark.parametrize("channels", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_images(channels, ceil_mode):
    x = torch.randint(0, 256, (2, channels, 15, 14), dtype=torch.uint8)
    compare(x, [3, 3], [2, 2], [1, 1], [1, 1], ceil_mode)
    compare(x, [2, 3], [], [0, 1], [1, 1], ceil_mode)
    compare(x, [3, 2], [1, 2], [1, 1], [3, 2], ceil_mode)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pool(data):
    axes = data.draw(st.sampled_from([1, 2, 3]))
    many = lambda *values: [data.draw(st.sampled_from(values)) for _ in range(axes)]
    size, stride, dilation = many(1, 2, 3, 5), many(1, 2, 3), many(1, 2, 3)
    padding = [data.draw(st.integers(0, k // 2)) for k in size]
    spatial = [max((k - 1) * d + 1, extent) for k, d, extent in zip(size, dilation, many(1, 4, 9), strict=True)]
    images, channels = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 20, 64, 70]))
    x = torch.randint(0, 256, (images, channels, *spatial), dtype=torch.uint8)
    compare(x, size, stride, padding, dilation, data.draw(st.booleans()))


@needs_kernels
def test_another_layout():
    """An image that does not lie channels last is copied."""
    x = torch.randint(0, 256, (2, 5, 8, 9), dtype=torch.uint8)
    found = on_kernel(Q.packed_max_pool.default, x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    assert torch.equal(found, functional.max_pool2d(x.double(), 3, 2, 1).to(torch.uint8))
