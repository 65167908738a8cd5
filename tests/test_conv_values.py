"""Which values of a convolutional graph get a name, and which do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qpass.passes.annotate import describe_sites
from qpass.sites import SiteNames
from tests.graphs import captured

aten = torch.ops.aten


class Net(nn.Module):
    """Two convolutions and their norms; `use` joins what they make."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.a, self.b, self.n, self.m = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
        )
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.use(self, x)


def outputs(use):
    """name -> operator of the value named."""
    gm, _ = captured(Net(use).eval(), torch.randn(2, 3, 8, 8))
    nodes, infos = describe_sites(gm, SiteNames())
    told = sorted(i.name for i in infos if i.operation in ("output", "operand"))
    assert told == sorted(n for n in nodes if n.endswith(".output"))
    return {name: node.target for name, node in nodes.items() if name.endswith(".output")}


def spread(x):
    return x.mean((2, 3))


A, B = "a:conv2d.0.output", "b:conv2d.0.output"
CASES = {
    "of a mean": (lambda m, x: spread(m.a(x)), {A: aten.convolution.default}),
    "behind a norm": (lambda m, x: spread(m.n(m.a(x))), {A: aten.batch_norm.default}),
    "behind an activation": (lambda m, x: spread(torch.relu(m.n(m.a(x)))), {A: aten.relu.default}),
    "one activation": (lambda m, x: spread(torch.sigmoid(torch.relu(m.a(x)))), {}),
    "a second norm": (lambda m, x: spread(m.m(m.n(m.a(x)))), {}),
    "a norm that others read": (
        lambda m, x: spread(m.m(m.n(m.a(x)))) + spread(m.n(m.b(x))),
        {B: aten.batch_norm.default},
    ),
    "of two products the later takes the sum": (
        lambda m, x: spread(torch.relu(m.n(m.a(x)) + m.m(m.b(x)))),
        {A: aten.batch_norm.default, B: aten.relu.default},
    ),
    "whatever their order in the sum": (
        lambda m, x: spread(m.b(x) + m.n(m.a(x))),
        {A: aten.add.Tensor, B: aten.convolution.default},
    ),
    "a sum with the input": (lambda m, x: spread(m.b(x) + x[:, :1].expand(-1, 4, -1, -1)), {B: aten.add.Tensor}),
    "a broadcast sum": (lambda m, x: spread(m.b(x) + m.n.weight.reshape(1, 4, 1, 1)), {B: aten.convolution.default}),
    "a sum with a factor": (
        lambda m, x: spread(torch.add(m.b(x), m.a(x), alpha=2)),
        {A: aten.convolution.default, B: aten.convolution.default},
    ),
    "twice itself": (lambda m, x: (lambda y: spread(y + y))(m.a(x)), {A: aten.convolution.default}),
    "read by two": (
        lambda m, x: (lambda y: spread(y) + spread(F.max_pool2d(y, 2)))(torch.relu(m.a(x))),
        {A: aten.relu.default},
    ),
    "a product (squeeze and excite)": (
        lambda m, x: spread((lambda y: y * torch.sigmoid(y.mean((2, 3), keepdim=True)))(torch.relu(m.a(x)))),
        {A: aten.relu.default},
    ),
    "concatenated": (
        lambda m, x: spread(torch.cat([torch.relu(m.a(x)), m.b(x)], 1)),
        {A: aten.relu.default, B: aten.convolution.default},
    ),
    "read by a site alone": (lambda m, x: m.last(torch.relu(m.a(x))), {}),
    "read by a softmax": (lambda m, x: torch.softmax(m.a(x), 1), {}),
    "the output of the graph": (lambda m, x: m.a(x), {}),
    "an output beside a mean": (lambda m, x: (lambda y: (y, spread(y)))(m.a(x)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_named(name):
    use, wanted = CASES[name]
    assert outputs(use) == wanted


def test_every_size_of_batch_gives_the_same_names():
    use = CASES["of two products the later takes the sum"][0]
    names = SiteNames()
    found = []
    for shape in ((2, 3, 8, 8), (5, 3, 16, 12)):
        gm, _ = captured(Net(use).eval(), torch.randn(shape))
        found.append(list(describe_sites(gm, names)[0]))
    assert found[0] == found[1]
