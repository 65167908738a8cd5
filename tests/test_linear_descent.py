"""Descent on the codes and steps of linears: never worse than where it starts, and what it does with odd weights."""

import pytest
import torch
from torch import nn

import qpass
from qpass import affine
from qpass.qtype import QType
from qpass.solvers.gptq import damped, gptq
from qpass.solvers.linear_descent import DAMPING, _refit, descent, refined
from qpass.solvers.steps import best_qparams

TYPES = ("i8/c0", "i4/c0", "u4/g32", "u3/g64", "u2/g32", "i3/g32", "u2/c0")


def problem(n=24, k=128, rows=500, seed=0):
    """(weight [n, k], second moments [k, k] of inputs that go together and have a mean)."""
    torch.manual_seed(seed)
    x = torch.randn(rows, k) @ torch.randn(k, k) / k**0.5 + torch.randn(k)
    return torch.randn(n, k) / 10, (x.t() @ x / rows).double()


def error(weight, moments, codes, params):
    """Of each output: (w - r) C (w - r)^T, in float64."""
    off = weight.double() - affine.dequantize(codes, params.scale, params.zero, params.type, torch.float64)
    return ((off @ damped(moments, DAMPING)) * off).sum(-1)


@pytest.mark.parametrize("text", TYPES)
def test_better_than_gptq(text):
    weight, moments = problem()
    qtype = QType.parse(text)
    start = best_qparams(weight, qtype)
    before = error(weight, moments, gptq(weight, moments, start), start)
    codes, params = descent(weight, moments, qtype)
    after = error(weight, moments, codes, params)
    assert (after <= before * 1.0001).all()
    assert after.sum() < (0.99 if qtype.bits > 4 else 0.93) * before.sum()
    assert codes.dtype == qtype.storage
    assert codes.min() >= qtype.qmin
    assert codes.max() <= qtype.qmax
    assert (params.scale > 0).all()
    assert (params.zero is None) == qtype.symmetric
    assert params.scale.shape == start.scale.shape


def test_no_single_change_of_a_code_helps():
    """A local minimum: with its steps, every code is the best for all the others."""
    weight, moments = problem(n=3, k=32)
    qtype = QType.parse("u3/g32")
    start = best_qparams(weight, qtype)
    codes, params = refined(weight, moments, gptq(weight, moments, start), start)
    least = error(weight, moments, codes, params)
    better = 0
    for j in range(32):
        for step in (-1, 1):
            moved = codes.clone().short()
            moved[:, j] = (moved[:, j] + step).clamp(qtype.qmin, qtype.qmax)
            better += int((error(weight, moments, moved.to(codes.dtype), params) < least * (1 - 1e-6)).sum())
    assert better <= 3, "steps moved last, so a code or two may be off"


def test_inputs_that_do_not_matter():
    """Channels that are always 0, an input that never varies, a weight of zeros, one far larger than the others."""
    weight, moments = problem(n=4, k=64)
    moments[:8], moments[:, :8] = 0, 0
    weight[1], weight[2, 40] = 0, 50.0
    for text in ("u2/g32", "u4/g32", "i4/c0"):
        for given in (moments, torch.zeros(64, 64, dtype=torch.float64)):
            codes, params = descent(weight, given, QType.parse(text))
            real = affine.dequantize(codes, params.scale, params.zero, params.type)
            assert torch.isfinite(real).all()
            assert not real[1].any()


def test_steps_alone():
    """Codes that are right already: the least squares finds the steps that made them."""
    _, moments = problem(k=64)
    qtype = QType.parse("i4/g32")
    codes = torch.randint(-7, 8, (5, 64), dtype=torch.int8)
    true = torch.rand(5, 2) + 0.5
    weight = affine.dequantize(codes, true, None, qtype)
    found = _refit(weight, moments.float(), codes.float(), true * 1.05, torch.zeros(5, 2), 32)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=0)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 32)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w2a16-g32", "w4a8-dynamic", "w4a8", "w4a16-c"])
def test_of_few_bits_it_is_what_auto_means(scheme):
    torch.manual_seed(0)
    model = Two().eval()
    mix = torch.randn(64, 64) / 8
    batches = [torch.randn(256, 64) @ mix for _ in range(6)]
    results = {}
    for solver in ("auto", "descent", "gptq", "rtn"):
        q = qpass.compile(model, f"{scheme},solver={solver}", batches[0], batches, backend="reference")
        with torch.no_grad():
            results[solver] = float((q(batches[5]) - model(batches[5])).norm())
    assert results["auto"] == results["descent"] < results["gptq"] < results["rtn"]
    plan = qpass.analyze(model, "w8a16", batches[0], batches)
    same = qpass.analyze(model, "w8a16,solver=gptq", batches[0], batches)
    for site in ("first:linear.0", "second:linear.0"):
        assert torch.equal(plan[site].packed.data, same[site].packed.data)
