"""Descent on codes and steps: never worse than where it starts, at rest at the end, group by group; and the input's error."""

import math

import pytest
import torch
from torch import nn

import qpass
from qpass import affine
from qpass.observations import Observed
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.ranges import Range
from qpass.solvers import descent
from qpass.solvers.gptq import damped, gptq
from qpass.solvers.input_error import input_error
from qpass.solvers.solve import denoised, with_noise
from qpass.solvers.steps import best_qparams

I4 = QType.parse("i4/c0")


def problem(groups, n, k, rows=300):
    """Weights [G, n, K], moments [G, K, K] of correlated inputs, steps [G, n]."""
    x = torch.randn(groups, rows, k) @ torch.randn(groups, k, k)
    weight = torch.randn(groups, n, k)
    return weight, (x.mT @ x).double() / rows, best_qparams(weight.flatten(0, 1), I4).scale.reshape(groups, n)


def test_it_is_better_than_gptq_and_in_range():
    weight, moments, scale = problem(1, 16, 300)
    first = gptq(weight[0], moments[0], QParams(scale[0], None, I4))[None]
    codes, steps = descent.best_codes(weight, moments, scale, I4)
    assert codes.dtype == torch.int8
    assert (int(codes.min()), int(codes.max())) == (I4.qmin, I4.qmax)
    before, after = (descent.error(weight, damped(moments), q, s) for q, s in ((first, scale), (codes, steps)))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.9 * float(before.sum())


def test_no_single_code_could_be_better(monkeypatch):
    monkeypatch.setattr(descent, "SWEEPS", 50)
    weight, moments, scale = problem(2, 4, 9)
    start = (weight / scale[..., None]).round().clamp(I4.qmin, I4.qmax)
    codes, steps = descent.descend(weight, moments, start, scale, I4, refit=False)
    assert torch.equal(steps, scale)
    least = descent.error(weight, moments, codes, scale)
    for column in range(9):
        for move in (-1, 1):
            other = codes.clone()
            other[..., column] = (other[..., column] + move).clamp(I4.qmin, I4.qmax)
            assert bool((descent.error(weight, moments, other, scale) >= least * (1 - 1e-5)).all())


@pytest.mark.parametrize("qtype", ["i4/c0", "i8/c0", "i2/c0"])
def test_groups_are_apart(qtype):
    qtype = QType.parse(qtype)
    weight, moments, scale = problem(5, 2, 9)
    codes, steps = descent.best_codes(weight, moments, scale, qtype)
    for g in range(0, 5, 2):
        pair = [g, (g + 1) % 5]  # two, since one group alone starts from GPTQ
        own, step = descent.best_codes(weight[pair], moments[pair], scale[pair], qtype)
        assert torch.equal(own[0], codes[g])
        torch.testing.assert_close(step[0], steps[g])


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e30])
def test_extreme_sizes_leave_usable_steps(size):
    weight, moments, _ = problem(3, 2, 4)
    weight = weight * size
    scale = best_qparams(weight.flatten(0, 1), I4).scale.reshape(3, 2)
    for factor in (1.0, 1e-30, 1e30):
        codes, steps = descent.best_codes(weight, moments * factor, scale, I4)
        QParams(steps.flatten(), None, I4).check()
        assert bool((codes.float() * steps[..., None] - weight).abs().max() <= 20 * scale.max())


def seen(rows):
    observed = Observed(Range.empty(channels=rows.shape[1], histogram=False), moment=torch.zeros([rows.shape[1]] * 2))
    observed.moment = observed.moment.double()
    observed.add(rows)
    return observed


def test_eight_bits_have_the_noise_of_their_step():
    params = affine.choose_qparams(torch.tensor(0.0), torch.tensor(2.0), QType.parse("u8/t"))
    found = input_error(seen(torch.rand(100, 6)), params, None, 3)
    assert float(found.shift.abs().max()) == 0
    torch.testing.assert_close(found.added, torch.full((6,), float(params.scale) ** 2 / 12, dtype=torch.float64))


def test_four_bits_have_what_is_measured():
    rows = torch.randn(400, 6).relu() * torch.tensor([1.0, 1, 1, 3, 3, 3])
    params = affine.choose_qparams(torch.tensor(0.0), torch.tensor(2.5), QType.parse("u4/t"))
    observed = seen(rows)
    found = input_error(observed, params, None, 3)
    off = (affine.fake_quantize(observed.sample, params) - observed.sample).double()
    assert torch.equal(found.shift[0], found.shift[2])
    torch.testing.assert_close(found.shift[3], off[:, 3:].mean(), rtol=1e-5, atol=0)
    assert float(found.shift[3]) < -0.1  # what is clipped
    assert float(found.added[0]) < float(params.scale) ** 2 / 12  # zeros have no error
    doubled = QParams(params.scale * 2, params.zero, params.type)
    times = input_error(observed, doubled, torch.full((6,), 2.0), 3)
    torch.testing.assert_close(times.shift, found.shift * 2, rtol=1e-4, atol=1e-5)


def test_weights_suit_the_error_that_is_measured():
    """One column: w* = w cov(x, q) / var(q), the least squares answer."""
    rows = torch.randn(512, 1).relu()
    params = affine.choose_qparams(torch.tensor(0.0), torch.tensor(1.5), QType.parse("u3/t"))
    observed = seen(rows)
    off = input_error(observed, params, None, 1)
    x, q = rows.double(), affine.fake_quantize(rows, params).double()
    x, q = x - x.mean(), q - q.mean()
    added = q.square().mean() - x.square().mean()  # below 0: clipped; the model keeps variances as they were
    wanted = 1 - ((q - x) * q).mean() / (x.square().mean() + added.clamp(min=0))
    found = denoised(torch.ones(1, 1), observed.covariance, off.added, off.pulled)
    torch.testing.assert_close(float(found), float(wanted), rtol=0.06, atol=0)  # damping
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(with_noise(eye, 2.0), 3 * eye)
    assert torch.equal(with_noise(eye.expand(2, 3, 3), torch.ones(2, 3)), 2 * eye.expand(2, 3, 3))


class Depthwise(nn.Module):
    """Expand, depthwise, project, add: an inverted bottleneck without norms."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return (x + self.c(nn.functional.relu6(self.b(nn.functional.relu6(self.a(x)))))).mean((2, 3))


def lost(scheme):
    """Relative RMS of a scheme's error, and its plan."""
    torch.manual_seed(0)
    model, batches = Depthwise().eval(), [torch.randn(4, 3, 12, 12).cumsum(3) / 3 for _ in range(4)]
    plan = qpass.analyze(model, scheme, batches[0], batches[:3])
    q = qpass.compile(model, plan=plan, backend="reference")
    with torch.no_grad():
        wanted, found = model(batches[3]), q(batches[3])
    return math.sqrt(float((found - wanted).square().mean() / wanted.square().mean())), plan


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "w4a8-dynamic", "w3a8"])
def test_few_bits_are_better_than_to_nearest(scheme):
    assert lost(scheme)[0] < 0.8 * lost(f"{scheme},solver=rtn")[0]


def test_what_an_add_or_a_mean_reads_has_eight_bits():
    _, plan = lost("w4a4")
    assert {str(d.input_type) for d in plan.quantized} == {"u4/t"}
    assert {str(d.input_type) for d in plan if d.is_output} == {"u8/t"}
