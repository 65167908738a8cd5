"""Patches times the weight as a matrix is the convolution at their positions."""

import pytest
import torch
from torch import nn

from qpass.convolutions import geometry_of_module
from qpass.patches import MOST, _positions, as_matrix, patches

CASES = (
    (nn.Conv1d(5, 7, 3, stride=2, padding=2, dilation=2), (3, 5, 13)),
    (nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 3, 7, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6)),
    (nn.Conv2d(5, 10, 3, groups=5, dilation=2), (1, 5, 9, 7)),
    (nn.Conv2d(3, 4, 1), (2, 3, 5, 5)),
    (nn.Conv3d(2, 3, (2, 1, 3), padding=(1, 0, 1)), (2, 2, 3, 4, 5)),
)
names = pytest.mark.parametrize(("module", "shape"), CASES, ids=lambda v: str(v).removeprefix("Conv"))


def products(module, rows):
    """[rows, N] of patches [rows, C * taps], group by group."""
    g = geometry_of_module(module)
    matrix = as_matrix(module.weight.detach(), g)
    parts = zip(rows.chunk(g.groups, 1), matrix.chunk(g.groups, 0), strict=True)
    return torch.cat([part @ own.t() for part, own in parts], 1) + module.bias.detach()


def by_position(y):
    return y.detach().movedim(1, -1).flatten(0, -2)


@names
def test_all_positions(module, shape):
    x = torch.randn(shape)
    rows = patches(x, geometry_of_module(module), most=10**6)
    torch.testing.assert_close(products(module, rows), by_position(module(x)), rtol=1e-5, atol=1e-5)


@names
def test_some_positions(module, shape):
    x = torch.randn(shape)
    count = len(by_position(module(x))) // 3
    found = products(module, patches(x, geometry_of_module(module), most=count))
    batch, *where = _positions([x.shape[0], *module(x).shape[2:]], count)
    chosen = module(x).detach().movedim(1, -1)[(batch, *where)]
    torch.testing.assert_close(found, chosen, rtol=1e-5, atol=1e-5)
    assert len(found) == count


@pytest.mark.parametrize("sizes", [(64, 16, 16), (16, 32, 32), (8, 56, 56), (4, 8, 8, 16)], ids=str)
def test_positions_are_of_every_place_of_an_image(sizes):
    """Where `most` divides the batch's positions, even distances would be whole lines, and the place in a line always one."""
    found = _positions(list(sizes), MOST)
    for index, size in zip(found, sizes, strict=True):
        assert len(index) == MOST
        counts = index.bincount(minlength=size)
        assert len(counts) == size
        assert counts.min() > 0
        assert counts.max() < 3 * MOST / size
    assert all(torch.equal(a, b) for a, b in zip(found, _positions(list(sizes), MOST), strict=True))


def test_fewer_positions_than_asked_for():
    module = nn.Conv2d(2, 3, 3)
    assert patches(torch.randn(1, 2, 3, 3), geometry_of_module(module)).shape == (1, 18)


@pytest.mark.parametrize("module", [nn.ConvTranspose1d(4, 3, 2, 2), nn.ConvTranspose2d(4, 5, (2, 3), (2, 3))], ids=str)
def test_transposed(module):
    """Without overlap each output is one product: y[b, n, i * k + t] = x[b, :, i] . w[:, n, t]."""
    g = geometry_of_module(module)
    x = torch.randn(2, 4, *(5, 3)[: g.axes])
    y = patches(x, g, most=10**6) @ as_matrix(module.weight.detach(), g).t()
    y = y.reshape(2, *x.shape[2:], module.out_channels, *g.kernel)
    axes = [i + offset for i in range(g.axes) for offset in (1, g.axes + 2)]  # position, tap of each axis
    y = y.permute(0, g.axes + 1, *axes).reshape(
        2, module.out_channels, *(s * k for s, k in zip(x.shape[2:], g.kernel, strict=True))
    )
    wanted = module(x).detach() - module.bias.detach().reshape(-1, *[1] * g.axes)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_half_types_are_read_as_float():
    module = nn.Conv1d(3, 4, 3)
    x = torch.randn(2, 3, 9).bfloat16()
    rows = patches(x, geometry_of_module(module))
    assert rows.dtype is torch.float32
    assert torch.equal(rows, patches(x.float(), geometry_of_module(module)))
