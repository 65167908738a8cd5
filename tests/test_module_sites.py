"""The sites of a model that is not run: those a capture finds, under the same names."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import qpass


class Turned(nn.Module):
    """A matrix held as [K, N], and a counter of calls."""

    def __init__(self, k=16, n=24):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(k, n)), nn.Parameter(torch.zeros(n))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x @ self.weight + self.bias


class Straight(nn.Module):
    """A matrix that `linear` multiplies by."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 24))

    def forward(self, x):
        return functional.linear(x, self.matrix)


class TwoInputs(Straight):
    """It cannot be called with rows alone."""

    def forward(self, x, scale):
        return functional.linear(x, self.matrix) * scale


class Sliced(nn.Embedding):
    """A table of positions that is not looked up."""

    def forward(self, ids):
        return self.weight[: ids.shape[1]]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(30, 16), Sliced(10, 16)
        self.first, self.again, self.last = Turned(), Turned(24, 24), Straight()
        self.plain = nn.Linear(8, 5)

    def forward(self, ids):
        return self.plain(self.last(self.again(self.first(self.table(ids) + self.places(ids)))))


def test_the_sites_of_a_capture():
    net = Net().eval()
    bare = qpass.analyze(net, "w8a16")
    run = qpass.analyze(net, "w8a16", torch.randint(0, 30, (2, 7)))
    assert [d.site for d in bare] == [d.site for d in run]
    assert [(d.weight, d.transposed, str(d.weight_type)) for d in bare] == [
        (d.weight, d.transposed, str(d.weight_type)) for d in run
    ]
    assert [d.weight for d in bare.quantized] == ["first.weight", "again.weight", "last.matrix", "plain.weight"]
    assert float(net.first.calls) == 0


@pytest.mark.parametrize("more", [TwoInputs(), nn.Bilinear(4, 4, 4)])
def test_what_does_not_run_on_rows_is_left(more):
    model = nn.Sequential(nn.Linear(8, 8), more).eval()
    assert [d.site for d in qpass.analyze(model, "w8a16")] == ["0:linear.0"]
