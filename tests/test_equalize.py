"""Factors for the channels between convolutions: exact, shared, none where they cannot go, and worth it."""

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
from qpass.solvers.convolution import by_channel, by_output
from qpass.solvers.cross_layer import usual
from tests.graphs import aten, captured, named, run
from tests.models import relative


class Depthwise(nn.Module):
    """Expand, depthwise, project. Channels differ in size by 100, and what reads them undoes it."""

    def __init__(self, act=F.relu, between=lambda x: x, spread=1.0):
        super().__init__()
        self.expand, self.depth, self.project = (
            nn.Conv2d(3, 24, 1),
            nn.Conv2d(24, 24, 3, 1, 1, 1, 24),
            nn.Conv2d(24, 8, 1),
        )
        self.a, self.b, self.act, self.between = nn.BatchNorm2d(24), nn.BatchNorm2d(24), act, between
        with torch.no_grad():
            for norm, reader in ((self.a, self.depth.weight[:, 0, 0]), (self.b, self.project.weight[:, :, 0, 0].t())):
                norm.weight.copy_(torch.logspace(-spread, spread, 24)[torch.randperm(24)])
                norm.bias.copy_(norm.weight * torch.rand(24))
                norm.running_mean.uniform_(-0.2, 0.2)
                reader.div_(norm.weight.reshape(-1, 1, *[1] * (reader.dim() - 2)))

    def forward(self, x):
        x = self.between(self.act(self.a(self.expand(x))))
        return self.project(self.act(self.b(self.depth(x))))


class Chain(nn.Module):
    """Two convolutions, and what stands between them."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.first, self.second = first or nn.Conv2d(3, 8, 3, padding=1), second or nn.Conv2d(8, 5, 3, padding=1)
        self.between, self.slope = between, nn.Parameter(torch.rand(8))
        with torch.no_grad():
            self.first.weight *= torch.logspace(-1, 1, 8).reshape(
                [-1 if n == 8 else 1 for n in self.first.weight.shape]
            )

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def images(count=32, seed=1):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def plan(model, scheme="w8a8", **options):
    batches = [images(seed=i) for i in range(4)]
    return qpass.analyze(model.eval(), scheme, batches[0][:4], batches, **options)


def factors(found):
    return {d.site.partition(":")[0]: d.packed.in_mul for d in found.quantized if d.packed.in_mul is not None}


def error(model, found, backend="reference"):
    torch._dynamo.reset()
    x = images(seed=9)
    with torch.no_grad():
        return relative(qpass.compile(model, plan=found, backend=backend)(x), model(x))


def migrated(model, found, x):
    """(graph of a packed copy after migrate, its result, that of the copy in float64)."""
    packed = copy.deepcopy(model)
    install(packed, found.packed)
    gm, values = captured(packed, x)
    context = Context(plan=found, backend=backend_named("reference", torch.device("cpu")), names=SiteNames())
    result = run(run_pipeline(gm, ORDER[:3], context), values)
    with torch.no_grad():
        return gm, result, packed.double()(x.double())


GROUPED, UP = nn.Conv2d(8, 12, 3, groups=4), nn.ConvTranspose2d(8, 6, 3, 2, groups=2)
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


@pytest.mark.parametrize("act", [F.relu, F.relu6])
@pytest.mark.parametrize(("scheme", "gain"), [("w8a8", 1.8), ("w8a8-dynamic", 1.8), ("w4a8", 1.0), ("w4a4", 1.2)])
def test_depthwise_networks_keep_their_accuracy(scheme, gain, act):
    torch.manual_seed(0)
    model = Depthwise(act)
    auto, none = plan(model, scheme), plan(model, f"{scheme},equalize=none")
    assert "project" in factors(auto)
    assert not factors(none)
    assert error(model, auto) * gain < error(model, none)


def test_equal_channels_have_no_factor():
    torch.manual_seed(0)
    model = Depthwise(spread=0.0)
    with torch.no_grad():
        model.expand.weight[:] = model.expand.weight[0]
        for values in (model.expand.bias, model.a.bias, model.a.running_mean):
            values.zero_()
    assert "depth" not in factors(plan(model, "w8a8"))


def test_no_factors_where_nothing_is_rounded_or_seen():
    assert not factors(plan(Depthwise(), "w8a16"))
    assert not factors(qpass.analyze(Depthwise().eval(), "w8a8-dynamic", images(2)))
    found = qpass.analyze(Depthwise().eval(), "w8a8-dynamic,equalize=weights", images(2))
    assert set(factors(found)) == {"depth", "project"}


class Shared(nn.Module):
    """One value, two readers, one behind a pool."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.a.weight *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)

    def forward(self, x):
        y = F.relu(self.a(x))
        return F.max_pool2d(self.b(y), 2) + self.c(F.max_pool2d(y, 2))


def test_readers_of_one_value_share_its_factor():
    torch.manual_seed(0)
    model = Shared()
    found = plan(model)
    assert torch.equal(factors(found)["b"], factors(found)["c"])
    assert torch.equal(found["a:conv2d.0.output"].input_mul, factors(found)["b"])
    assert error(model, found) < error(model, plan(model, "w8a8,equalize=none"))
    assert not factors(plan(model, recipe={"c": None}))
    assert not factors(plan(model, recipe={"c": "w4a8"}))


def test_an_edited_plan_still_computes_the_model():
    torch.manual_seed(0)
    for model, site in ((Shared(), "c"), (Shared(), "a"), (Depthwise(F.relu6), "project"), (Depthwise(), "expand")):
        found = plan(model)
        found[site] = None
        assert error(model, found) < 0.03
        assert error(model, found, "cpu") < 0.03


@pytest.mark.parametrize("mode", ["auto", "weights"])
def test_dead_channels(mode):
    torch.manual_seed(0)
    model = Depthwise()
    with torch.no_grad():
        model.a.weight[:3], model.a.bias[:3] = 0.0, 0.0
        model.a.bias[3] = -100.0
        model.project.weight[:, 4:6] = 0.0
        model.b.weight[7], model.b.bias[7] = 0.0, 2.0
    found = plan(model, f"w8a8,equalize={mode}")
    assert factors(found)
    assert all(torch.isfinite(m).all() and (m > 0).all() for m in factors(found).values())
    assert error(model, found) < 0.03


def test_a_saved_plan_has_them(tmp_path):
    torch.manual_seed(0)
    model = Shared()
    found = plan(model)
    found.save(tmp_path / "net.plan")
    again = qpass.Plan.load(tmp_path / "net.plan")
    assert torch.equal(factors(again)["c"], factors(found)["c"])
    assert torch.equal(again["a:conv2d.0.output"].input_mul, found["a:conv2d.0.output"].input_mul)
    assert error(model, again) == error(model, found)
    q = qpass.compile(model, plan=found, backend="reference")
    qpass.save(q, tmp_path / "net.qpass")
    loaded = qpass.load(tmp_path / "net.qpass", Shared().eval(), backend="reference")
    with torch.no_grad():
        assert torch.equal(loaded(images(4)), q(images(4)))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w4a4", "w8a8,equalize=weights"])
@pytest.mark.parametrize("build", [lambda: Depthwise(F.relu6), Depthwise, Shared], ids=["relu6", "relu", "shared"])
def test_cpu_computes_what_reference_does(build, scheme):
    torch.manual_seed(0)
    model = build()
    found, x = plan(model, scheme), images(4, seed=9)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted, result = (qpass.compile(model, plan=found, backend=name)(x) for name in ("reference", "cpu"))
    assert relative(result, wanted) < (5e-2 if scheme == "w4a4" else 5e-3)


def test_a_plan_in_torch_compile():
    torch.manual_seed(0)
    model = Depthwise(F.relu6)
    found, x = plan(model), images(4, seed=9)
    with torch.no_grad():
        wanted = qpass.compile(model, plan=found, backend="reference")(x)
        result = torch.compile(model, backend="qpass", options={"plan": found, "backend": "reference"})(x)
    assert relative(result, wanted) < 1e-5


def test_weights_that_make_a_channel_are_as_large_as_those_that_read_it():
    torch.manual_seed(0)
    model = Depthwise()
    m = factors(plan(model, "w8a8,equalize=weights"))
    norms = [(n.weight / (n.running_var + n.eps).sqrt()).detach() for n in (model.a, model.b)]
    first = model.expand.weight.detach().flatten(1).abs().amax(1) * norms[0] * m["depth"]
    depth = model.depth.weight.detach().flatten(1).abs().amax(1)
    assert torch.allclose(first, depth * norms[1] * m["project"] / m["depth"], rtol=0.01)
    last = model.project.weight.detach().flatten(2).abs().amax((0, 2)) / m["project"]
    assert torch.allclose(depth * norms[1] * m["project"] / m["depth"], last, rtol=0.01)


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


def test_weights_by_channel_and_by_output():
    from qpass.convolutions import geometry_of_module

    for module in (nn.Conv2d(8, 12, 3), GROUPED, UP):
        g, weight = geometry_of_module(module), module.weight.detach()
        assert by_channel(weight, g).shape[0] == 8
        assert by_output(weight, g).shape[0] == module.out_channels
        for view in (by_channel, by_output):
            assert torch.equal(view(weight, g).flatten().sort().values, weight.flatten().sort().values)


def test_usual_sizes():
    found = usual(torch.tensor([0.0, 1.0, 4.0, 1e-9]))
    assert found.tolist()[1:3] == [1.0, 4.0]
    assert found[3] == pytest.approx(4e-4)
    assert found[0] == pytest.approx((4 * 4e-4) ** (1 / 3))
    assert usual(torch.zeros(2)).tolist() == [1.0, 1.0]
