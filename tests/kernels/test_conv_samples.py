"""Convolutions of images that have a scale and a zero point each, against the kernel's reference and plain torch."""

import pytest
import torch

from qpass_kernels import conv, conv_depthwise
from qpass_kernels.configs import Config
from qpass_kernels.conv_finish import Finish
from qpass_kernels.conv_weights import Window, correction, pack, pack_depthwise
from tests.kernels.images import check_same, codes, convolved, finish, reference, values

GEOMETRIES = (  # channels, rows, columns, outputs, kernel, stride, padding, groups
    (16, 7, 5, 33, (3, 3), (1, 1), (1, 1), 1),
    (5, 9, 7, 16, (3, 3), (2, 2), (0, 1, 2, 1), 1),
    (16, 5, 6, 7, (1, 1), (1, 1), (0, 0), 1),
    (16, 6, 5, 8, (3, 1), (1, 1), (1, 0), 2),
)


def images(count):
    """(scale float32 [B, 1, 1, 1], zero int32, the same) of so many images."""
    scale = torch.rand(count, 1, 1, 1) + 0.1
    return scale, torch.randint(-128, 128, (count, 1, 1, 1), dtype=torch.int32)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_images(geometry, batch):
    c, h, w, n, kernel, stride, padding, groups = geometry
    x, weight, window = codes(batch, c, h, w), codes(n, c // groups, *kernel), Window(kernel, stride, padding, (1, 1))
    scale, zero = images(batch)
    sums = convolved((x - zero).double() * scale.double(), weight.double(), window, groups)
    after = finish(sums, act="relu", sample_scale=scale, sample_zero=zero)
    held = x, pack(weight), correction(weight, 1), window, after, groups
    expected = reference(*held)
    real = (sums * after.alpha.double()[:, None, None] + after.beta.double()[:, None, None]).relu()
    torch.testing.assert_close(expected.double(), real, rtol=0, atol=1e-6 * float(real.abs().max()))
    for config in (None, Config(bm=16, bn=16, bk=32, band=2), Config(bm=16, bn=64, bk=32, split=2)):
        check_same(conv.convolve(*held, config), expected)


@pytest.mark.parametrize("padding", [(0, 0), (1, 2)], ids=str)
def test_depthwise(padding):
    x, weight, window = codes(3, 12, 7, 6), codes(12, 1, 3, 3), Window((3, 3), (1, 1), padding, (1, 1))
    scale, zero = images(3)
    sums = convolved((x - zero).double() * scale.double(), weight.double(), window, 12)
    after = finish(sums, sample_scale=scale, sample_zero=zero)
    packed = pack_depthwise(weight)
    listed = [list(getattr(window, name)) for name in Window.__dataclass_fields__]
    expected = torch.ops.qpass_kernels.depthwise2d(x, packed, 0, *listed, *values(after), 12)
    real = sums * after.alpha.double()[:, None, None] + after.beta.double()[:, None, None]
    torch.testing.assert_close(expected.double(), real, rtol=0, atol=1e-6 * float(real.abs().max()))
    check_same(conv_depthwise.convolve(x, packed, 0, window, after, 12), expected)


def test_float8_has_scales_alone():
    x, weight = (torch.randn(2, 16, 5, 5).to(torch.float8_e4m3fn) for _ in range(2))
    scale, _ = images(2)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    after = Finish(torch.rand(2), sample_scale=scale)
    held = x, pack(weight[..., :3, :3]), None, window, after, 1
    real = convolved(x.double() * scale.double(), weight[..., :3, :3].double(), window, 1)
    real = real * after.alpha.double()[:, None, None]
    check_same(conv.convolve(*held), reference(*held))
    torch.testing.assert_close(reference(*held).double(), real, rtol=0, atol=1e-6 * float(real.abs().max()))


def test_a_one_by_one_is_no_matmul_of_rows():
    plain = Window((1, 1), (1, 1), (0, 0), (1, 1))
    assert not conv.is_matmul(plain, Finish(torch.ones(2), sample_scale=torch.ones(1)), 1)


SCALE, ZERO = torch.ones(2), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("after", "table", "says"),
    [
        ({"sample_scale": torch.ones(3)}, True, "sample_scale must have 2 elements, not 3"),
        ({"sample_scale": SCALE.double()}, True, "sample_scale must be torch.float32"),
        ({"sample_scale": SCALE, "sample_zero": ZERO.float()}, True, "sample_zero must be torch.int32"),
        ({"sample_scale": SCALE, "sample_zero": ZERO[:1]}, True, "sample_zero must have 2 elements, not 1"),
        ({"sample_zero": ZERO}, True, "sample_zero needs sample_scale"),
        ({"sample_scale": SCALE, "sample_zero": ZERO}, False, "sample_zero is of int8, with the correction"),
    ],
)
def test_bad_input(after, table, says):
    weight, window = codes(7, 16, 3, 3), Window((3, 3), (1, 1), (1, 1), (1, 1))
    held = codes(2, 16, 5, 5), pack(weight), correction(weight, 1) if table else None, window
    for run in (conv.convolve, reference):
        with pytest.raises(ValueError, match=f"conv2d: .*{says}"):
            run(*held, Finish(torch.ones(7), **after), 1)
