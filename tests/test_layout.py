"""Images stay channels last from the first layer to the last: no copies between layers, strides as they are told."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.backends import cpu, native
from qpass.passes.layout import is_channels_last
from tests.graphs import Strides, lowered
from tests.models import relative
from tests.processors import needs_bytes

aten = torch.ops.aten
pytestmark = needs_bytes
COPIES = (aten.clone.default, aten.contiguous.default)


def conv_norm(c, n, k=3, stride=1, groups=1, act=True):
    layers = [nn.Conv2d(c, n, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(n)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class Block(nn.Module):
    """A bottleneck, with a convolution on the shortcut where the shape changes."""

    def __init__(self, c, n, stride=1):
        super().__init__()
        self.body = nn.Sequential(conv_norm(c, 8, 1), conv_norm(8, 8, 3, stride), conv_norm(8, n, 1, act=False))
        self.down = conv_norm(c, n, 1, stride, act=False) if c != n or stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.body(x) + self.down(x))


class Shuffle(nn.Module):
    def __init__(self, c):
        super().__init__()
        half = c // 2
        self.branch = nn.Sequential(
            conv_norm(half, half, 1), conv_norm(half, half, 3, 1, half, False), conv_norm(half, half, 1)
        )

    def forward(self, x):
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        batch, c, h, w = x.shape
        return x.view(batch, 2, c // 2, h, w).transpose(1, 2).reshape(batch, c, h, w)


def head(c):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)


class Pyramid(nn.Module):
    """Upsampled, added, concatenated, padded."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv_norm(3, 8), conv_norm(8, 8, 3, 2), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        a = self.a(x)
        b = F.interpolate(self.b(a), scale_factor=2.0)
        return self.c(F.pad(torch.cat([a, b + a], 1), (1, 1, 1, 1)))


NETS = {
    "resnet": lambda: nn.Sequential(
        conv_norm(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1), Block(16, 16), Block(16, 24, 2), Block(24, 24), *head(24)
    ),
    "shufflenet": lambda: nn.Sequential(
        conv_norm(3, 16, 3, 2), Shuffle(16), Shuffle(16), conv_norm(16, 24, 1), *head(24)
    ),
    "odd channels": lambda: nn.Sequential(
        conv_norm(3, 5), conv_norm(5, 17, 3, 2), conv_norm(17, 1, 1), nn.Conv2d(1, 3, 3)
    ),
    "pyramid": Pyramid,
}


@functools.cache
def build(name):
    """(model, plan, batch)."""
    torch.manual_seed(0)
    model, data = NETS[name]().eval(), [torch.randn(4, 3, 16, 16) for _ in range(2)]
    return model, qpass.analyze(model, "w8a8", data[0], data), data[0]


@functools.cache
def laid_out(name, until="layout"):
    model, plan, x = build(name)
    return lowered(model, plan, x, until=until)


def products(gm):
    return [node for node in gm.graph.nodes if node.target in cpu.BACKEND.channels_last()]


def sources(node, seen=None):
    """Everything a node is computed from."""
    seen = set() if seen is None else seen
    for each in node.all_input_nodes:
        if each not in seen:
            seen.add(each)
            sources(each, seen)
    return seen


def copies(gm):
    """Copies of what one quantized convolution made on its way to another."""
    made = products(gm)
    behind = [n for n in gm.graph.nodes if n.target in COPIES and any(p in sources(n) for p in made)]
    return [n for n in behind if any(n in sources(p) for p in made)]


@pytest.mark.skipif(native.unavailable() is not None, reason=f"the max pool is torch's: {native.unavailable()}")
@pytest.mark.parametrize("name", NETS)
def test_no_copies_between_layers(name, monkeypatch):
    """On kernels of ours: oneDNN's, which are taken where there is AMX, read no parts and write sums in place."""
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    model, plan, x = build(name)
    gm, _ = lowered(model, plan, x, until="layout")
    assert len(products(gm)) >= len([d for d in plan.quantized if d.operation == "conv2d"])
    assert not copies(gm)


@pytest.mark.parametrize("name", NETS)
def test_strides_are_as_told(name):
    model, _, x = build(name)
    gm, values = laid_out(name)
    with torch.no_grad():
        out = Strides(gm).run(*values)
        assert relative(out[0], model(x)) < 0.15


@pytest.mark.parametrize("name", NETS)
def test_kernels_read_and_write_channels_last(name):
    gm, _ = laid_out(name)
    for node in products(gm):
        assert is_channels_last(node.meta["val"]), node.format_node()


@pytest.mark.parametrize("name", ["shufflenet", "odd channels", "pyramid"])  # what is summed onto is laid out first
def test_layout_moves_no_bit(name):
    (before, values), (after, _) = laid_out(name, "lower"), laid_out(name)
    with torch.no_grad():
        assert torch.equal(after(*values)[0], before(*values)[0])


def test_the_reference_backend_lays_nothing_out():
    model, plan, x = build("odd channels")
    before, _ = lowered(model, plan, x, backend="reference", until="lower")
    after, _ = lowered(model, plan, x, backend="reference")
    assert [n.target for n in before.graph.nodes] == [n.target for n in after.graph.nodes]


# images that are a part of something, or lie in another order
PARTS = {
    "channels last": lambda: torch.randn(3, 3, 10, 9).contiguous(memory_format=torch.channels_last),
    "every other row": lambda: torch.randn(3, 3, 20, 9)[:, :, ::2],
    "every other column": lambda: torch.randn(3, 3, 10, 18)[..., ::2],
    "every other image": lambda: torch.randn(6, 3, 10, 9)[::2],
    "some channels": lambda: torch.randn(3, 7, 10, 9)[:, 2:5],
    "a window": lambda: torch.randn(3, 3, 14, 15)[:, :, 2:12, 3:12],
    "turned": lambda: torch.randn(3, 10, 9, 3).permute(0, 3, 1, 2),
    "one for all": lambda: torch.randn(1, 3, 10, 9).expand(3, -1, -1, -1),
}


@pytest.fixture(scope="module", params=["cpu", "reference"])
def small(request):
    """(float, compiled): as few generated kernels as can be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    data = [torch.randn(4, 3, 10, 9) for _ in range(3)]
    return model, qpass.compile(model, "w8a8", data[0], data, backend=request.param)


@pytest.mark.parametrize("name", PARTS)
def test_images_that_lie_otherwise(small, name):
    """The kernels read what was given where it lies: the same result as of a copy that lies as usual."""
    model, q = small
    x = PARTS[name]()
    with torch.no_grad():
        torch.testing.assert_close(q(x), q(x.contiguous()), rtol=1e-6, atol=1e-6)
        assert relative(q(x), model(x)) < 0.1
