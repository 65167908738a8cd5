"""Every spelling of a convolution is one operator afterwards, and computes what the model computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.convolutions import CONVOLUTION, geometry, geometry_of_module, is_convolution
from tests.graphs import captured, named, run, targets
from tests.models import relative

MODULES = (
    (nn.Conv1d(4, 6, 3), (2, 4, 11)),
    (nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 11)),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 17)),
    (nn.Conv2d(3, 5, (3, 1), stride=(2, 1), padding=(1, 0), bias=False), (2, 3, 9, 7)),
    (nn.Conv2d(4, 8, 3, padding=1, groups=4, dilation=2), (1, 4, 9, 9)),
    (nn.Conv2d(3, 5, 3, padding="same"), (2, 3, 8, 7)),
    (nn.Conv2d(3, 5, (4, 3), padding="same"), (2, 3, 8, 7)),
    (nn.Conv2d(3, 5, (2, 4), padding="same", dilation=(1, 3)), (2, 3, 8, 17)),
    (nn.Conv2d(3, 5, 3, padding="valid", stride=2), (2, 3, 8, 7)),
    (nn.Conv2d(3, 5, 3, padding=2, padding_mode="circular"), (2, 3, 8, 7)),
    (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 7)),
    (nn.Conv2d(3, 5, 4, padding="same", padding_mode="replicate"), (2, 3, 8, 7)),
    (nn.Conv3d(2, 4, (1, 3, 2), padding="same"), (1, 2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 4, 2, 1, output_padding=1), (2, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (2, 4, 5, 6)),
    (nn.ConvTranspose3d(2, 3, 2, 2, bias=False), (1, 2, 3, 4, 2)),
)
UNBATCHED = (
    (nn.Conv1d(4, 6, 3), (4, 11)),
    (nn.Conv2d(3, 5, 4, padding="same"), (3, 8, 7)),
    (nn.Conv3d(2, 4, 2), (2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 4, 2, 1), (4, 7)),
    (nn.ConvTranspose2d(4, 6, 3), (4, 5, 6)),
)
W, B, T = (nn.Parameter(torch.randn(shape)) for shape in ((6, 2, 3, 3), 6, (4, 3, 2, 2)))
FUNCTIONS = {
    "numbers": lambda x: F.conv2d(x, W, B, 2, 1, 1, 2),
    "lists": lambda x: F.conv2d(x, W, None, [2, 1], [1, 0], [1, 2], 2),
    "one number in a list": lambda x: F.conv2d(x, W, None, [2], [1], [1], 2),
    "keywords": lambda x: F.conv2d(x, W, groups=2, bias=B, dilation=2),
    "same": lambda x: F.conv2d(x, W, B, padding="same", groups=2),
    "valid": lambda x: torch.conv2d(x, W, B, padding="valid", groups=2),
    "transposed": lambda x: F.conv_transpose2d(x, T, None, 2, 1, 1, 2),
    "transposed by keywords": lambda x: torch.conv_transpose2d(x, T, stride=(1, 2), groups=2),
    "any": lambda x: torch.convolution(x, W, B, [2, 2], [1, 1], [1, 1], False, [0, 0], 2),
    "any, transposed": lambda x: torch.convolution(x, T, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 2),
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.any = function, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.function(x) + self.any


def check(model, shape):
    """One canonical convolution, equal to eager; returns it."""
    x = torch.randn(shape)
    gm, values = captured(model.eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(run(gm, values), model(x), rtol=1e-6, atol=1e-6)
    (node,) = [n for n in gm.graph.nodes if is_convolution(n)]
    assert not [t for t in targets(gm) if "conv" in str(t) and t is not CONVOLUTION]
    assert all(len(values) == len(node.args[3]) for values in node.args[4:6])
    assert node.meta["val"].dim() == node.args[1].meta["val"].dim()
    return node


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda v: str(v).removeprefix("Conv"))
def test_modules(module, shape):
    node = check(module, shape)
    plain = module.padding_mode == "zeros"
    assert not plain or geometry(node) == geometry_of_module(module)
    assert geometry(node).operation == type(module).__name__.lower().replace("transpose", "_transpose")


@pytest.mark.parametrize(("module", "shape"), UNBATCHED, ids=lambda v: str(v).removeprefix("Conv"))
def test_without_a_batch(module, shape):
    node = check(module, shape)
    assert node.meta["val"].shape[0] == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    check(Function(FUNCTIONS[name]), (2, 4, 9, 10))


class Given(nn.Module):
    """The weight is an input, so the size of its kernel is not known."""

    def __init__(self, padding):
        super().__init__()
        self.padding, self.own = padding, nn.Conv2d(3, 3, 1)

    def forward(self, x, w):
        return F.conv2d(self.own(x), w, padding=self.padding)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_a_weight_that_is_an_input(padding):
    model, x, w = Given(padding).eval(), torch.randn(2, 3, 8, 9), torch.randn(4, 3, 3, 4)
    gm, values = captured(model, x, w)
    torch.testing.assert_close(run(gm, values), model(x, w).detach(), rtol=1e-6, atol=1e-6)
    plan = qpass.analyze(model, "w8a8", (x, w), [(x, w), (x[:1], w)])
    assert [d.site for d in plan.quantized] == ["own:conv2d.0"]
    q = qpass.compile(model, plan=plan, backend="reference")
    for each in (w, torch.randn(2, 3, 2, 5)):
        assert relative(q(x, each), model(x, each).detach()) < 0.05


def test_an_uneven_padding_is_a_pad_of_its_own():
    gm, _ = captured(nn.Conv2d(3, 5, 4, padding="same").eval(), torch.randn(2, 3, 8, 7))
    (pad,) = named(gm, torch.ops.aten.pad.default)
    assert pad.args[1] == [0, 1, 0, 1]
    gm, _ = captured(nn.Conv2d(3, 5, 3, padding="same").eval(), torch.randn(2, 3, 8, 7))
    assert not named(gm, torch.ops.aten.pad.default)


def test_one_graph_for_every_batch_and_size():
    model = nn.Conv2d(3, 5, 4, padding="same").eval()
    gm, values = captured(model, torch.randn(2, 3, 8, 8))
    x = torch.randn(5, 3, 8, 8)
    batch = [v for v in values if isinstance(v, int)]
    found = run(gm, [5 if isinstance(v, int) else x if v.dim() == 4 and v.shape[0] == 2 else v for v in values])
    assert batch == [2]
    torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-6)
