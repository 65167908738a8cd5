"""Batch norm folded: as near to float64 as the norm itself was; what cannot be folded stays."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.graphs import constant
from qpass.passes.fold_norm import NORM, fold_norm
from qpass.pipeline import Settings
from tests.graphs import captured, named, run, targets
from tests.models import relative

aten = torch.ops.aten
Q = torch.ops.qpass
EXACT = 1e-6


def lively(model):
    """Statistics and factors that are no identity: negative, zero and large ones among them."""
    for norm in model.modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.01, 4)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.weight.data[0], norm.weight.data[1] = 0.0, -3.0
    return model.eval()


def two(layer, norm):
    return nn.Sequential(layer, norm)


# name -> (model, shape of its input, operators that stand in the norm's place)
FOLDED = {
    "one axis": (two(nn.Conv1d(3, 7, 3), nn.BatchNorm1d(7)), (2, 3, 9), ()),
    "two axes": (two(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7)), (2, 3, 9, 8), ()),
    "three axes": (two(nn.Conv3d(2, 5, 2), nn.BatchNorm3d(5)), (2, 2, 4, 4, 3), ()),
    "groups": (two(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.BatchNorm2d(8)), (2, 4, 6, 6), ()),
    "depthwise": (two(nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.BatchNorm2d(5)), (2, 5, 6, 6), ()),
    "without factors": (two(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7, affine=False)), (2, 3, 6, 6), ()),
    "a large epsilon": (two(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7, eps=0.1)), (2, 3, 6, 6), ()),
    "transposed": (two(nn.ConvTranspose2d(4, 6, 3, 2, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5), ()),
    "transposed in groups": (two(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5), (1, 1)),
    "linear": (two(nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6), ()),
    "linear without bias": (two(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)), (5, 6), ()),
    "linear of many rows": (two(nn.Linear(6, 8), nn.BatchNorm1d(4)), (5, 4, 6), (1, 1)),
    "in front": (two(nn.BatchNorm2d(3), nn.Conv2d(3, 7, 3)), (2, 3, 6, 6), (1, 1)),
    "by itself": (two(nn.Conv2d(3, 7, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(7))), (2, 3, 6, 6), (1, 1)),
    "twice": (two(two(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)), nn.BatchNorm2d(7)), (2, 3, 6, 6), ()),
}


def distance(model, gm, values, x):
    """(error after folding, error of the model itself), both against the model in float64."""
    with torch.no_grad():
        full = copy.deepcopy(model).double()(x.double())
        return relative(run(gm, values), full), relative(model(x), full)


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    made, shape, left = FOLDED[name]
    model, x = lively(copy.deepcopy(made)), torch.randn(shape)
    gm, values = captured(model, x)
    norms = len(named(gm, NORM))
    assert fold_norm(gm) == norms > 0
    gm.recompile()
    assert not named(gm, NORM)
    assert (len(named(gm, aten.mul.Tensor)), len(named(gm, aten.add.Tensor))) == (left or (0, 0))
    after, before = distance(model, gm, values, x)
    assert after <= max(EXACT, before)
    assert fold_norm(gm) == 0


class Shared(nn.Module):
    """One convolution, its result read twice; one convolution called twice, each call with a norm of its own."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.two, self.three = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.read(x)
        y = self.one(y) + y
        return self.three(self.called(self.two(self.called(y))))


def test_shared():
    model, x = lively(Shared()), torch.randn(2, 3, 6, 6)
    gm, values = captured(model, x)
    assert fold_norm(gm) == 3
    gm.recompile()
    assert len(named(gm, aten.mul.Tensor)) == 1  # the result that others read too
    after, before = distance(model, gm, values, x)
    assert after <= max(EXACT, before)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4, affine=True)], ids=str
)
def test_statistics_of_the_batch_stay(norm):
    model, x = two(nn.Conv2d(3, 4, 3), norm).eval(), torch.randn(2, 3, 6, 6)
    gm, values = captured(model, x)
    before = targets(gm)
    assert fold_norm(gm) == 0
    assert targets(gm) == before
    torch.testing.assert_close(run(gm, values), model(x).detach())


@pytest.mark.parametrize("name", ["two axes", "groups", "transposed", "linear", "in front", "by itself"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(name, dtype):
    """Folding rounds a weight once more than the norm did; alone, torch's norm stays."""
    made, shape, left = FOLDED[name]
    model, x = lively(copy.deepcopy(made)).to(dtype), torch.randn(shape, dtype=dtype)
    gm, values = captured(model, x)
    assert fold_norm(gm) == (0 if left else 1)
    gm.recompile()
    assert run(gm, values).dtype is dtype
    after, before = distance(model, gm, values, x)
    assert after <= before + torch.finfo(dtype).eps / 2


class Packed(nn.Module):
    """A convolution of integers, and its norm."""

    def __init__(self, transposed=False):
        super().__init__()
        self.axis, self.norm = int(transposed), nn.BatchNorm2d(6)
        self.register_buffer("w", torch.randint(-127, 128, (6, 6, 3, 3), dtype=torch.int8))
        self.register_buffer("s", torch.rand(6) / 100)

    def forward(self, x):
        w = Q.dequantize(self.w, self.s, None, f"i8/c{self.axis}", torch.float32)
        return self.norm((F.conv_transpose2d if self.axis else F.conv2d)(x, w))

    def double(self):
        weight = self.w.double() * self.s.double().reshape([-1 if i == self.axis else 1 for i in range(4)])
        convolution = F.conv_transpose2d if self.axis else F.conv2d
        return lambda x: self.norm.double()(convolution(x, weight))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_integers_stay(transposed):
    model, x = lively(Packed(transposed)), torch.randn(2, 6, 7, 7)
    gm, values = captured(model, x)
    assert fold_norm(gm) == 1
    gm.recompile()
    assert not named(gm, NORM)
    (weight,) = named(gm, Q.dequantize.default)
    data = constant(weight.args[0])
    assert torch.equal(data.abs(), model.w.abs())
    after, before = distance(model, gm, values, x)
    assert after <= max(EXACT, before)


@pytest.mark.parametrize("name", ["groups", "transposed", "transposed in groups", "linear", "in front", "twice"])
def test_within_a_quantized_model(name, monkeypatch):
    """QPASS_CHECK=numeric holds the pass to 1e-4 on what it really gets; the results stay near float."""
    monkeypatch.setenv("QPASS_CHECK", "numeric")
    assert Settings.from_env().check == "numeric"
    made, shape, _ = FOLDED[name]
    model, data = lively(copy.deepcopy(made)), [torch.randn(shape) for _ in range(3)]
    q = qpass.compile(model, "w8a8", data[0], data, backend="reference")
    with torch.no_grad():
        assert relative(q(data[0]), model(data[0])) < 0.05
