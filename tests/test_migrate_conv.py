"""Factors of convolutions' channels go into what makes the value, exactly, and nowhere else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.backends import backend_named
from qpass.install import install
from qpass.packing import gathered, spread
from qpass.passes import ORDER
from qpass.pipeline import Context, run_pipeline
from qpass.sites import SiteNames
from tests.graphs import aten, captured, named, run
from tests.models import relative
from tests.models_equalize import GROUPED, UP, Chain, Depthwise, Shared, error, factors, images, plan


def migrated(model, found, x):
    """(graph of a packed copy after migrate, its result, that of the copy in float64)."""
    packed = copy.deepcopy(model)
    install(packed, found.packed)
    gm, values = captured(packed, x)
    context = Context(plan=found, backend=backend_named("reference", torch.device("cpu")), names=SiteNames())
    result = run(run_pipeline(gm, ORDER[:3], context), values)
    with torch.no_grad():
        return gm, result, packed.double()(x.double())


BETWEEN = {
    "nothing": Chain(lambda m, y: y),
    "relu": Chain(lambda m, y: F.relu(y)),
    "leaky relu": Chain(lambda m, y: F.leaky_relu(y, 0.3)),
    "prelu": Chain(lambda m, y: F.prelu(y, m.slope)),
    "relu6": Chain(lambda m, y: F.relu6(y)),
    "hardtanh": Chain(lambda m, y: F.hardtanh(y, 0.0, 0.5)),
    "clamp": Chain(lambda m, y: y.clamp(0, 0.25)),
    "pools": Chain(lambda m, y: F.avg_pool2d(F.max_pool2d(F.relu(y), 2), 2)),
    "zeros": Chain(lambda m, y: F.pad(F.relu6(y), (1, 2, 0, 1))),
    "border": Chain(lambda m, y: F.pad(y, (1, 1, 1, 1), mode="reflect")),
    "grouped reader": Chain(lambda m, y: F.relu(y), second=GROUPED),
    "transposed reader": Chain(lambda m, y: F.relu(y), second=UP),
    "transposed producer": Chain(lambda m, y: F.relu(y), first=nn.ConvTranspose2d(3, 8, 3)),
    "no bias": Chain(lambda m, y: F.relu(y), first=nn.Conv2d(3, 8, 3, bias=False)),
    "norms": Depthwise(),
    "norms and bounds": Depthwise(F.relu6),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_factors_go_into_what_makes_the_value(name):
    model = BETWEEN[name].eval()
    found = plan(model, "w8a16,equalize=weights")
    assert factors(found)
    gm, result, wanted = migrated(model, found, images(4))
    assert not named(gm, aten.mul.Tensor)
    assert relative(result, wanted) < 1e-6
    with torch.no_grad():
        assert relative(wanted, model(images(4))) < 0.02


BLOCKED = {
    "residual": lambda m, y: F.relu(y) + y,
    "concatenate": lambda m, y: torch.cat([y[:, :4], y[:, 4:]], 1),
    "another reader": lambda m, y: y * y.mean(),
    "sigmoid": lambda m, y: torch.sigmoid(y),
    "negative bound": lambda m, y: F.hardtanh(y, -1.0, 1.0),
    "ones around": lambda m, y: F.pad(y, (1, 1), value=1.0),
    "channels mixed": lambda m, y: F.pixel_unshuffle(y[:, :2], 2),
}


@pytest.mark.parametrize("mode", ["auto", "weights"])
@pytest.mark.parametrize("name", BLOCKED)
def test_who_else_reads_a_value_keeps_it(name, mode):
    model = Chain(BLOCKED[name])
    assert not factors(plan(model, f"w8a8,equalize={mode}"))
    assert "second" in factors(plan(Chain(lambda m, y: y), "w8a8,equalize=weights"))


def test_an_edited_plan_still_computes_the_model():
    torch.manual_seed(0)
    for model, site in ((Shared(), "c"), (Shared(), "a"), (Depthwise(F.relu6), "project"), (Depthwise(), "expand")):
        found = plan(model)
        found[site] = None
        assert error(model, found) < 0.03
        assert error(model, found, "cpu") < 0.03


def test_a_plan_in_torch_compile():
    torch.manual_seed(0)
    model = Depthwise(F.relu6)
    found, x = plan(model), images(4, seed=9)
    with torch.no_grad():
        wanted = qpass.compile(model, plan=found, backend="reference")(x)
        result = torch.compile(model, backend="qpass", options={"plan": found, "backend": "reference"})(x)
    assert relative(result, wanted) < 1e-5


@pytest.mark.parametrize("module", [nn.Conv2d(8, 12, 3), GROUPED, UP, nn.Conv1d(8, 16, 3, groups=8)])
def test_spread_and_gathered(module):
    factor, weight = torch.rand(8) + 0.5, module.weight.detach()
    shaped = spread(factor, weight, module.transposed)
    assert torch.equal(gathered(shaped, module.groups, module.transposed), factor)
    x = torch.randn(2, 8, *[7] * (weight.dim() - 2))
    wanted = module(x * factor.reshape(-1, *[1] * (weight.dim() - 2)))
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.weight *= shaped
        assert relative(module(x), wanted) < 1e-6
