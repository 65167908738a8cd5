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
