"""Every solver of linears, on every kind of weight type: what it gives, what it improves on, and what it says."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import qpass
from qpass import affine
from qpass.decide import _solve
from qpass.errors import QpassError
from qpass.observations import Observed
from qpass.qtype import QType
from qpass.ranges import Range
from qpass.schemes import Scheme
from qpass.solvers.awq import NOT_FREE
from qpass.solvers.gptq import DAMPING, damped, factored
from qpass.solvers.methods import METHODS, rounded
from qpass.solvers.rtn import nearest, round_with
from qpass.solvers.smoothquant import UNMOVED
from qpass.solvers.solve import solve
from tests.models import relative
from tests.models_gated import gated

TYPES = ("u4/g32", "i4/c0", "u2/g32", "u3/g32", "i8/c0")
LOOKS = ("gptq", "descent", "adaround", "awq")  # at second moments


def inputs(k=96, rows=600, seed=0):
    """[rows, k]: channels of different sizes that go together and have means."""
    torch.manual_seed(seed)
    return (torch.randn(rows, k) @ torch.randn(k, k) / k**0.5 + torch.randn(k)) * torch.randn(k).exp()


def problem():
    """(weight [24, 96], second moments [96, 96])."""
    x = inputs()
    return torch.randn(24, 96) / 10, (x.t() @ x / len(x)).double()


def error(weight, moments, codes, params):
    off = weight.double() - affine.dequantize(codes, params.scale, params.zero, params.type, torch.float64)
    return float(((off @ moments) * off).sum())


@pytest.mark.parametrize("text", TYPES)
@pytest.mark.parametrize("solver", METHODS)
def test_codes_are_of_the_type_and_always_the_same(solver, text):
    weight, moments = problem()
    qtype = QType.parse(text)
    codes, params = rounded(weight, moments, 0.0, qtype, solver)
    assert codes.dtype == qtype.storage
    assert codes.shape == weight.shape
    assert codes.min() >= qtype.qmin
    assert codes.max() <= qtype.qmax
    assert (params.scale > 0).all()
    assert params.scale.shape == affine.limits(weight, qtype)[0].shape
    assert (params.zero is None) == qtype.symmetric
    assert params.zero is None or (params.zero.min() >= qtype.qmin and params.zero.max() <= qtype.qmax)
    again = rounded(weight.clone(), moments.clone(), 0.0, qtype, solver)
    assert torch.equal(codes, again[0])
    assert torch.equal(params.scale, again[1].scale)
    real = affine.dequantize(codes, params.scale, params.zero, qtype)
    assert relative(real, weight) < {2: 0.8, 3: 0.45, 4: 0.25, 8: 0.02}[qtype.bits]


@pytest.mark.parametrize("text", TYPES)
@pytest.mark.parametrize("solver", LOOKS)
def test_who_looks_at_moments_loses_less_of_the_output(solver, text):
    weight, moments = problem()
    qtype = QType.parse(text)
    least = error(weight, moments, *METHODS["rtn"](weight, moments, qtype))
    found = error(weight, moments, *METHODS[solver](weight, moments, qtype))
    clips = solver == "awq"
    assert found <= least * (1.0 if clips else 0.8)


@pytest.mark.parametrize("text", ["u2/g32", "u4/g32", "i4/c0", "i4/c1", "i8/c0"])
def test_what_hqq_and_the_others_make_of_odd_weights(text):
    """A weight of zeros, one value far larger than the others, one sign only."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[1], weight[:, 1], weight[2, 40], weight[3] = 0, 0, 50.0, weight[3].abs() + 1
    qtype = QType.parse(text)
    packed = round_with(METHODS["hqq"], weight, qtype)
    real = affine.dequantize(packed.data, packed.scale, packed.zero, qtype)
    assert torch.isfinite(real).all()
    assert not real[1].any()
    if qtype.axis == 1:
        return
    for solver in METHODS:
        codes, params = rounded(weight, torch.zeros(64, 64, dtype=torch.float64), 0.0, qtype, solver)
        real = affine.dequantize(codes, params.scale, params.zero, qtype)
        assert torch.isfinite(real).all(), solver
        assert not real[1].any(), solver


def test_dampening_grows_until_it_is_enough():
    """Moments with a direction of negative variance, as no data makes them but rounded sums may."""
    basis, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for negative, tries in ((0.01, 0), (0.3, 1), (3.0, 2)):
        values = torch.ones(16, dtype=torch.float64)
        values[0] = -negative
        moments = basis @ values.diag() @ basis.t()
        wanted = damped(moments, DAMPING * 10**tries)
        factor = factored(moments)
        torch.testing.assert_close(factor @ factor.t(), wanted)
        codes = METHODS["gptq"](torch.randn(8, 16), moments, QType.parse("i4/c0"))[0]
        assert codes.abs().max() <= 7
    with pytest.raises(torch.linalg.LinAlgError, match="no dampening up to 50 of their mean"):
        factored(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0, 1.0]).double()) - 1)
    with pytest.raises(torch.linalg.LinAlgError):
        factored(torch.full((4, 4), torch.nan, dtype=torch.float64))


def observed(x):
    seen = Observed(Range.empty(channels=x.shape[1]), moment=torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
    seen.add(x)
    return seen


@pytest.mark.parametrize("scheme", ["w4a16-g32,solver=gptq", "w8a16,solver=gptq", "w8a8-dynamic"])
def test_moments_that_nothing_mends_leave_weights_to_nearest_with_a_note(scheme):
    weight, seen = problem()[0], observed(inputs())
    parsed = Scheme.parse(scheme)
    assert _solve([weight], parsed, seen, [False])[1] == ""
    seen.moment -= 300 * seen.moment.diagonal().mean() * torch.eye(96)
    found, note = _solve([weight], parsed, seen, [False])
    assert "rounded to nearest" in note
    plain = round_with(nearest, weight, parsed.weight)
    assert torch.equal(found.packed[0].data, plain.data)


@pytest.mark.parametrize(("scheme", "note"), [("w4a16-g32,solver=awq", NOT_FREE), ("w8a8,solver=smoothquant", UNMOVED)])
def test_a_product_that_is_not_free_is_left_out_and_said(scheme, note):
    weight, seen = problem()[0], observed(inputs())
    found = solve([weight], Scheme.parse(scheme), seen, free=True, splits=False)
    assert found.packed[0].in_mul is not None
    assert found.note == ""
    found = solve([weight], Scheme.parse(scheme), seen, free=False, splits=False)
    assert found.packed[0].in_mul is None
    assert found.note == note


def test_smoothquant_is_half_of_the_reach_and_to_nearest():
    weight, seen = problem()[0], observed(inputs())
    found = solve([weight], Scheme.parse("w8a8-dynamic,solver=smoothquant"), seen, free=True, splits=False)
    wanted = solve([weight], Scheme.parse("w8a8-dynamic,smooth=0.5,solver=rtn"), seen, free=True, splits=False)
    assert torch.equal(found.packed[0].data, wanted.packed[0].data)
    assert torch.equal(found.packed[0].in_mul, wanted.packed[0].in_mul)
    other = solve([weight], Scheme.parse("w8a8-dynamic,smooth=0.8,solver=smoothquant"), seen, free=True, splits=False)
    assert not torch.equal(other.packed[0].in_mul, wanted.packed[0].in_mul)


@pytest.mark.parametrize("solver", ["awq", "adaround", "hqq", "smoothquant"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w4a8-g32-dynamic"])
def test_with_integer_inputs(scheme, solver):
    model, batches = gated("layer")
    q = qpass.compile(model, f"{scheme},solver={solver}", batches[0], batches, backend="reference")
    assert relative(q(batches[3]), model(batches[3])) < (0.05 if "w8" in scheme else 0.15)


def test_without_data():
    model, batches = gated("layer")
    for solver in ("gptq", "descent", "awq", "adaround"):
        with pytest.raises(QpassError, match=rf"solver={solver} looks at .* calibration=.*solver=rtn or solver=hqq"):
            qpass.compile(model, f"w4a16-g32,solver={solver}")
    with pytest.raises(QpassError, match="solver=gptq"):
        qpass.compile(model, "w4a16-g32", recipe={"up": "w4a16,solver=gptq"})
    with pytest.raises(BackendCompilerFailed, match=r"solver=awq looks at .* calibration="):
        torch.compile(model, backend="qpass", options={"scheme": "w4a16-g32,solver=awq"})(batches[0])
    weights = {}
    for solver in ("auto", "rtn", "hqq"):
        plan = qpass.analyze(model, f"w4a16-g32,solver={solver}")
        assert not any(d.note for d in plan)
        weights[solver] = plan["up:linear.0"].packed.data
    assert torch.equal(weights["auto"], weights["rtn"])
    assert not torch.equal(weights["hqq"], weights["rtn"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("w4a16,solver=smoothquant", "use solver=awq"),
        ("w8a8,solver=smoothquant,smooth=none", "use solver=rtn"),
        ("w8a8,smooth=0.3,solver=awq", "drop smooth="),
        ("fp8,solver=gptq", "drop solver=gptq"),
        ("w8a8,solver=hqqq", "Did you mean 'hqq'"),
    ],
)
def test_what_does_not_go_together(text, match):
    with pytest.raises(QpassError, match=match):
        Scheme.parse(text)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(50, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.inner(self.embed(x))


def test_a_table_says_that_no_input_was_seen():
    model, ids = Table().eval(), torch.arange(40).reshape(2, 20)
    plan = qpass.analyze(model, "w4a16-g32,solver=gptq", ids, [ids], {"embed": "w4a16-g32,solver=gptq"})
    assert "solver=gptq" in plan["embed:embedding.0"].note
    plan = qpass.analyze(model, "w4a16-g32", ids, [ids], {"embed": "w4a16-g32,solver=hqq"})
    assert plan["embed:embedding.0"].note == ""


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_a_channel_that_never_moved_has_a_usual_factor(scheme):
    """What comes to it later is not clipped more than what comes to others."""
    torch.manual_seed(0)
    model = nn.Linear(32, 8).eval()
    batches = [torch.randn(64, 32) * (torch.arange(32) != 5) for _ in range(4)]
    plan = qpass.analyze(model, f"{scheme},smooth=1.0", batches[0], batches)
    factors = plan[":linear.0"].packed.in_mul
    others = factors[torch.arange(32) != 5]
    assert others.min() * 0.5 < factors[5] < others.max() * 2
    q, x = qpass.compile(model, plan=plan, backend="reference"), torch.randn(64, 32)
    with torch.no_grad():
        assert relative(q(x), model(x)) < 0.02
