"""Processors that add products of u8 and i8 in pairs, in 16 bits: what could saturate keeps its reference."""

import pytest
import torch
from torch import nn

import qpass
from qpass.backends import cpu
from tests.models import relative


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.setattr(cpu, "saturates", lambda: True)


@pytest.mark.parametrize("scheme", ["w8a7", "w7a8", "w8a7-dynamic", "w4a8-c", "w8a8", "w8a8-dynamic"])
def test_the_largest_products(pairs, scheme):
    """Weights and inputs at both ends of their ranges, all of one sign in a row: no sum could be larger."""
    model = nn.Linear(66, 5, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5])[:, None].expand(5, 66))
        model.weight[2:, ::3] *= -1
    x = torch.cat([torch.ones(3, 66), torch.zeros(2, 66), torch.rand(4, 66)])
    plan = qpass.analyze(model, f"{scheme},smooth=none", x, None if "dynamic" in scheme else [x])
    q = qpass.compile(model, plan=plan, example_inputs=x, backend="cpu")
    with torch.no_grad():
        wanted = qpass.compile(model, plan=plan, example_inputs=x, backend="reference")(x)
        assert relative(q(x), wanted) < 1e-6
    kept = dict(qpass.inspect(q).record().kept)
    if scheme.startswith("w8a8"):
        (why,) = kept.values()
        assert "neither VNNI nor AMX" in why
        assert "w8a7" in why
    else:
        assert not kept


def test_without_a_scheme(pairs):
    """What cannot saturate is chosen, and said."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval(), torch.randn(40, 64)
    plan = qpass.analyze(model, None, x, [x])
    assert str(plan.scheme) == "w7a8"
    assert "no scheme was given: w7a8" in plan.summary()
    assert str(qpass.analyze(model).scheme) == "w7a8-dynamic"
    q = qpass.compile(model, None, x, [x], guard=False, backend="cpu")
    report = qpass.inspect(q)
    assert "no scheme was given: w7a8" in report.plan.summary()
    assert not report.record().kept
    assert relative(q(x), model(x).detach()) < 0.03
    exact = qpass.inspect(qpass.compile(model, None, x, [x], guard=False, backend="reference")).plan
    assert str(exact.scheme) == "w8a8"
    old = qpass.quantize_dynamic(model)
    assert str(qpass.inspect(old).plan.scheme) == "w7a8-dynamic"
    front = torch.compile(model, backend="qpass")
    with torch.no_grad():
        assert 0 < relative(front(x), model(x)) < 0.03


def test_convolutions(pairs):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(2, 3, 9, 9)
    for scheme, stays in (("w8a7", False), ("w8a8", True)):
        plan = qpass.analyze(model, scheme, x, [x])
        q = qpass.compile(model, plan=plan, example_inputs=x, backend="cpu")
        with torch.no_grad():
            wanted = qpass.compile(model, plan=plan, example_inputs=x, backend="reference")(x)
            assert relative(q(x), wanted) < 1e-2
        why = [text for _, text in qpass.inspect(q).record().kept]
        assert len(why) == (2 if stays and cpu.conv_lower.unavailable() else 0), why
