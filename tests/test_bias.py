"""Bias correction beside a float input: in the model's own parameters, where nothing else reads them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import qpass
from tests.models import relative
from tests.untouched import untouched

SCHEME = "w3a16-g32,sequential=no"


def data(count=4, width=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, width, generator=generator) + 1.5 for _ in range(count)]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()


def mean_error(plan, m, site, batches):
    """Of a first layer: what its rounded weight and corrected bias get wrong in the mean, beside the weight's alone."""
    decision, x = plan[site], torch.cat(batches).flatten(0, 1)
    packed = decision.packed
    real = qpass.affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
    off = functional.linear(x, real - m.get_parameter(decision.weight)).mean(0)
    return float((off + decision.bias).detach().norm() / off.detach().norm())


@pytest.mark.parametrize("scheme", [SCHEME, "w4a16-c,solver=gptq,sequential=no", "w8a16", "w2a16-g32,solver=rtn"])
def test_the_mean_of_every_output_stays(scheme):
    m, batches = model(), data()
    plan = qpass.analyze(m, scheme, batches[0], batches)
    first = plan.quantized[0]
    assert first.input_type is None
    assert first.bias_name == "0.bias"
    assert mean_error(plan, m, first.site, batches) < 1e-3


def test_it_is_in_the_parameter_of_the_copy(tmp_path):
    m, batches = model(), data()
    with untouched(m):
        q = qpass.compile(m, SCHEME, batches[0], batches, backend="reference")
    plan = qpass.inspect(q).plan
    assert set(plan.biases) == {"0.bias", "2.bias"}
    for name, more in plan.biases.items():
        assert torch.equal(q.get_parameter(name), m.get_parameter(name) + more)
        assert not torch.equal(q.get_parameter(name), m.get_parameter(name))
    with torch.no_grad():
        assert relative(q(batches[0]), q._call_impl(batches[0])) < 1e-5
    qpass.save(q, tmp_path / "q")
    again = qpass.load(tmp_path / "q", model(), backend="reference")
    plan.save(tmp_path / "plan")
    other = qpass.compile(m, plan=qpass.Plan.load(tmp_path / "plan"), backend="reference")
    with torch.no_grad():
        assert torch.equal(again(batches[1]), q(batches[1]))
        assert torch.equal(other(batches[1]), q(batches[1]))


def test_in_place_and_interrupted(monkeypatch):
    m, batches = model(), data()
    real = qpass.api.attach

    def stopped(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(qpass.api, "attach", stopped)
    with untouched(m), pytest.raises(KeyboardInterrupt):
        qpass.compile(m, SCHEME, batches[0], batches, backend="reference", inplace=True)


def test_it_lessens_the_error():
    m, batches = model(), data(16)
    held_out = torch.randn(64, 6, 32) + 1.5
    errors = {}
    with torch.no_grad():
        for bias in ("mean", "none"):
            q = qpass.compile(m, f"w2a16-g32,solver=rtn,bias={bias}", batches[0], batches, backend="reference")
            errors[bias] = relative(q(held_out), m(held_out))
    assert errors["mean"] < 0.8 * errors["none"]


class Shared(nn.Module):
    """Two products that add one bias; one product twice; one whose bias is added later; one without."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.bias = self.a.bias
        self.later, self.bare = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

    def forward(self, x):
        y = functional.linear(self.a(x) + self.b(x), self.later.weight) * 2 + self.later.bias
        return self.bare(y)


def test_a_bias_that_others_read_stays():
    torch.manual_seed(0)
    m, batches = Shared().eval(), data()
    q = qpass.compile(m, SCHEME, batches[0], batches, backend="reference")
    plan = qpass.inspect(q).plan
    assert len(plan.quantized) == 4
    assert not plan.biases
    with torch.no_grad():
        assert torch.equal(q.a.bias, m.a.bias)
        assert relative(q(batches[0]), m(batches[0])) < 0.2


def test_no_data_no_correction():
    plan = qpass.analyze(model(), "w4a16-g32", data()[0])
    assert not plan.biases
