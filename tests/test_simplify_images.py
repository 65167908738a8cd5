"""Other spellings of what later passes know by one name; what only looks like them stays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qpass.passes.simplify_images import simplify_images
from tests.graphs import captured, run, targets

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.stem = function, nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.function(self.stem(x))


def shuffle(x, groups, swap=(1, 2), copy=False, flat=False):
    b, c, h, w = x.shape
    y = x.view(b, groups, c // groups, h, w).transpose(*swap)
    y = y.contiguous() if copy else y
    return y.flatten(1, 2) if flat else y.reshape(b, c, h, w)


def by_permute(x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(b, c, h, w)


def read_between(x):
    b, c, h, w = x.shape
    y = x.view(b, 2, c // 2, h, w)
    return y.transpose(1, 2).reshape(b, c, h, w) + y.sum()


def across_axes(x):
    b, c, h, w = x.shape
    return x.view(b, c, h, 2, w // 2).transpose(3, 4).reshape(b, c, h, w)


def shuffled_columns(x):
    """The second axis is not the channels': [B, C, ...] seen as [B, H, ...] of other sizes."""
    b, c, h, w = x.shape
    return x.reshape(b, 4, c * h // 4, w).transpose(1, 2).reshape(b, c, h, w)


# name -> (function, operator wanted, operator gone)
MEETS = {
    "hardtanh": (lambda x: F.hardtanh(x, 0.0, 6.0), aten.relu6.default, aten.hardtanh.default),
    "hardtanh of integers": (lambda x: F.hardtanh(x, 0, 6), aten.relu6.default, aten.hardtanh.default),
    "relu6": (F.relu6, aten.relu6.default, aten.hardtanh.default),
    "pool to one": (lambda x: F.adaptive_avg_pool2d(x, 1), aten.mean.dim, aten.adaptive_avg_pool2d.default),
    "pool to one by one": (lambda x: F.adaptive_avg_pool2d(x, (1, 1)), aten.mean.dim, aten.adaptive_avg_pool2d.default),
    "pool of one axis": (
        lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1),
        aten.mean.dim,
        aten.adaptive_avg_pool1d.default,
    ),
    "pool of three axes": (
        lambda x: F.adaptive_avg_pool3d(x.unsqueeze(2), 1),
        aten.mean.dim,
        aten.adaptive_avg_pool3d.default,
    ),
    "shuffle": (lambda x: shuffle(x, 2), aten.channel_shuffle.default, aten.transpose.int),
    "shuffle in four": (lambda x: shuffle(x, 4), aten.channel_shuffle.default, aten.transpose.int),
    "shuffle the other way": (lambda x: shuffle(x, 2, (2, 1)), aten.channel_shuffle.default, aten.transpose.int),
    "shuffle and copy": (lambda x: shuffle(x, 2, copy=True), aten.channel_shuffle.default, aten.transpose.int),
    "shuffle and flatten": (lambda x: shuffle(x, 2, flat=True), aten.channel_shuffle.default, aten.transpose.int),
}
STAYS = {
    "another limit": lambda x: F.hardtanh(x, 0.0, 5.0),
    "both signs": lambda x: F.hardtanh(x),
    "pool to two": lambda x: F.adaptive_avg_pool2d(x, 2),
    "pool to a row": lambda x: F.adaptive_avg_pool2d(x, (1, 2)),
    "read between": read_between,
    "other axes": across_axes,
    "not the channels": shuffled_columns,
    "permute": by_permute,
    "negative axes": lambda x: shuffle(x, 2, (-4, -3)),
}


@pytest.mark.parametrize("name", MEETS)
def test_meets(name):
    function, wanted, gone = MEETS[name]
    model, x = Function(function), torch.randn(2, 3, 6, 4) * 5
    gm, values = captured(model, x)
    before = run(gm, values)
    simplify_images(gm)
    gm.recompile()
    assert wanted in targets(gm)
    assert gone not in targets(gm)
    assert torch.equal(run(gm, values), before)
    torch.testing.assert_close(run(gm, values), model(x).detach())
    assert simplify_images(gm) == 0


@pytest.mark.parametrize("name", STAYS)
def test_stays_or_is_exact(name):
    model, x = Function(STAYS[name]), torch.randn(2, 3, 6, 4) * 5
    gm, values = captured(model, x)
    before = run(gm, values)
    simplify_images(gm)
    gm.recompile()
    assert torch.equal(run(gm, values), before)


PADS = {  # padding of what is in front -> padding of the convolution, and pads left
    "even": (lambda m, x: m.conv(F.pad(x, (2, 2, 1, 1))), [2, 3], 0),
    "one axis": (lambda m, x: m.conv(F.pad(x, (2, 2))), [1, 3], 0),
    "of nothing": (lambda m, x: m.conv(F.pad(x, (0, 0, 0, 0))), [1, 1], 0),
    "uneven": (lambda m, x: m.conv(F.pad(x, (0, 1, 0, 1))), [1, 1], 1),
    "another value": (lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=1.0)), [1, 1], 1),
    "another mode": (lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")), [1, 1], 1),
    "cropping": (lambda m, x: m.conv(F.pad(x, (-1, -1, -1, -1))), [1, 1], 1),
    "channels": (lambda m, x: m.wide(F.pad(x, (0, 0, 0, 0, 1, 1))), [1, 1], 1),
    "read by others": (lambda m, x: m.conv(y := F.pad(x, (1, 1, 1, 1))).sum() + y.sum(), [2, 2], 1),
    "transposed": (lambda m, x: m.up(F.pad(x, (1, 1, 1, 1))), [1, 1], 1),
}


class Padded(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use = use
        self.conv, self.wide = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.use(self, x)


@pytest.mark.parametrize("name", PADS)
def test_zeros_around_an_image_become_padding(name):
    use, padding, left = PADS[name]
    gm, inputs = captured(Padded(use).eval(), torch.randn(2, 3, 8, 9))
    wanted = run(gm, inputs)
    simplify_images(gm)
    gm.recompile()
    torch.testing.assert_close(run(gm, inputs), wanted, rtol=1e-5, atol=1e-5)
    found = [n for n in gm.graph.nodes if n.target is aten.convolution.default]
    assert [list(n.args[4]) for n in found] == [padding]
    assert sum(n.target in (aten.pad.default, aten.constant_pad_nd.default) for n in gm.graph.nodes) == left
