"""Convolutional networks on the triton backend, on CPU tensors: its graph, and that it computes what the reference does."""

import pytest
import torch
from torch import nn

import qpass
from tests.models_vision import build
from tests.test_triton_backend import lowered, sqnr_db

NETS = ("resnet", "resnext", "mobilenet", "mobilenet-v3", "shufflenet", "super-resolution", "borders")
KERNELS = ("conv2d", "depthwise2d", "max_pool2d")


def both(model, x, scheme="w8a8"):
    plan = qpass.analyze(model, scheme, example_inputs=x, calibration=[x])
    return [qpass.compile(model, plan=plan, example_inputs=x, backend=name) for name in ("triton", "reference")]


def count(graph):
    return {name: graph.count(f"qpass_kernels.{name}(") for name in KERNELS}


@pytest.mark.parametrize("name", NETS)
def test_networks(name):
    model, draw = build(name)
    x = draw()
    found, wanted = both(model, x)
    other = draw(3)
    with torch.no_grad():
        assert sqnr_db(wanted(x), found(x)) > 30
        assert sqnr_db(wanted(other), found(other)) > 30
    graph = lowered(found)
    assert "qpass.conv(" not in graph
    quantized = [d for d in qpass.inspect(found).plan.quantized if "conv" in d.site and ".output" not in d.site]
    assert count(graph)["conv2d"] + count(graph)["depthwise2d"] >= len(quantized) > 2


def test_codes_stay_codes():
    """From the first convolution to the last nothing is float, turned or copied: one kernel a layer, 8 bits between them."""
    model, draw = build("resnet")
    graph = lowered(both(model, draw())[0])
    lines = [line for line in graph.splitlines() if "int8[" in line.split("#")[-1]]
    moves = [line for line in lines if "qpass_kernels." not in line]
    assert len(moves) <= 6, moves  # of the image, of what the mean reads, of its quantize
    assert "aten.clone" not in graph


class Stem(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, **options)
        self.b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("options", [{"padding": 2, "stride": 2}, {"dilation": 2}, {"padding": (0, 1)}], ids=str)
def test_borders_hold_the_zero_point(options):
    """Values far from 0 everywhere: were padding another value than 0, the border would show it."""
    x = torch.rand(2, 3, 9, 11) + 3
    found, wanted = both(Stem(**options).eval(), x)
    with torch.no_grad():
        assert sqnr_db(wanted(x), found(x)) > 35


@pytest.mark.parametrize(
    ("make", "shape", "says"),
    [
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), (2, 3, 5, 5, 5), "images and signals, not 3-d ones"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), (2, 3, 8, 8), "not transposed ones"),
    ],
)
def test_what_stays(make, shape, says):
    x = torch.randn(shape)
    found, wanted = both(make().eval(), x)
    assert says in str(qpass.inspect(found))
    with torch.no_grad():
        assert sqnr_db(wanted(x), found(x)) > 60


class Signal(nn.Module):
    """1-d: a stem, a depthwise convolution with a residual, a pool."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv1d(3, 16, 5, 2, 2), nn.Conv1d(16, 16, 3, 1, 1, groups=16)
        self.point, self.pool, self.last = nn.Conv1d(16, 16, 1), nn.MaxPool1d(3, 2, 1), nn.Conv1d(16, 8, 3, dilation=2)

    def forward(self, x):
        x = self.pool(self.stem(x).relu())
        x = x + self.point(self.deep(x).relu())
        return self.last(x.relu())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_signals(scheme):
    """A signal is an image of one row."""
    x = torch.randn(2, 3, 37)
    found, wanted = both(Signal().eval(), x, scheme)
    with torch.no_grad():
        assert found(x).shape == (2, 8, 6)
        assert sqnr_db(wanted(x), found(x)) > 45
    graph = lowered(found)
    assert count(graph) == {"conv2d": 3, "depthwise2d": 1, "max_pool2d": int(scheme == "w8a8")}
    assert "qpass.conv(" not in graph


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "borders"])
def test_a_scale_for_each_image(name):
    model, draw = build(name)
    found, wanted = both(model, draw(), "w8a8-dynamic")
    x = draw(3) * torch.tensor([1.0, 0.01, 30.0]).reshape(3, 1, 1, 1)
    with torch.no_grad():
        assert sqnr_db(wanted(x), found(x)) > 45  # a scale's last bit, and a code that it decides
    graph = lowered(found)
    assert "qpass.conv(" not in graph
    assert sum(count(graph).values()) > 2
