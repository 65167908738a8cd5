"""Factors for the channels between convolutions: chosen, shared, kept, and worth it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.convolutions import geometry_of_module
from qpass.observations import halves
from qpass.solvers.channel_sizes import usual
from qpass.solvers.convolution import by_channel, by_output
from tests.models import relative
from tests.models_equalize import GROUPED, UP, Depthwise, Shared, error, factors, images, plan


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


def test_readers_of_one_value_share_its_factor():
    torch.manual_seed(0)
    model = Shared()
    found = plan(model)
    assert torch.equal(factors(found)["b"], factors(found)["c"])
    assert torch.equal(found["a:conv2d.0.output"].input_mul, factors(found)["b"])
    assert error(model, found) < error(model, plan(model, "w8a8,equalize=none"))
    assert not factors(plan(model, recipe={"c": None}))
    assert not factors(plan(model, recipe={"c": "w4a8"}))


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


def test_weights_by_channel_and_by_output():
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


def test_halves_of_images_do_not_depend_on_their_batch():
    x = images(16)
    whole, parts = halves(x), [halves(x[:5]), halves(x[5:])]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
        assert len(whole[i]) > 2
