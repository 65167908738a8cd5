"""AWQ: its factor loses less of the output, is one for all that read an input, and goes into the norm that makes it."""

import copy

import pytest
import torch

import qpass
from qpass.install import install
from qpass.qtype import QType
from qpass.solvers.awq import choose_awq
from qpass.solvers.rtn import nearest
from tests.models import relative
from tests.models_gated import NORMS, gated
from tests.test_solvers import TYPES, error, inputs, problem


@pytest.mark.parametrize("text", TYPES)
def test_the_factor_of_awq_loses_less_of_the_output(text):
    weight, moments = problem()
    qtype = QType.parse(text)
    v = choose_awq(weight, moments, inputs().abs().mean(0), qtype)
    codes, params = nearest(weight / v, None, qtype)
    with_factor = error(weight / v, moments * torch.outer(v, v), codes, params)
    plain = error(weight, moments, *nearest(weight, None, qtype))
    assert with_factor < 0.9 * plain
    assert v.log().mean().abs() < 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g32", "w4a16-c"])
def test_the_factor_of_awq_goes_into_the_norm(norm, scheme):
    model, batches = gated(norm)
    plan = qpass.analyze(model, f"{scheme},solver=awq", batches[0], batches)
    gate, up = plan["gate:linear.0"].packed, plan["up:linear.0"].packed
    assert gate.in_mul is not None
    assert torch.equal(gate.in_mul, up.in_mul)
    q = qpass.compile(model, plan=plan, example_inputs=batches[0], backend="reference")
    muls = [line for line in qpass.inspect(q).graph("migrate").splitlines() if "mul(" in line]
    products = {"layer": 1, "rms": 1, "spelled": 3}[norm]  # of the model itself
    assert sum("in_mul" in line for line in muls) <= int(plan["down:linear.0"].packed.in_mul is not None)
    assert len(muls) <= products + int(plan["down:linear.0"].packed.in_mul is not None)
    eager = copy.deepcopy(model)
    install(eager, plan.packed, plan.biases)
    for x in batches:
        torch.testing.assert_close(q(x), eager(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_awq_is_closer_to_float_than_to_nearest(norm):
    model, batches = gated(norm)
    wanted = model(batches[3])
    lost = {}
    for solver in ("awq", "rtn"):
        q = qpass.compile(model, f"w4a16-g32,solver={solver}", calibration=batches, backend="reference")
        lost[solver] = relative(q(batches[3]), wanted)
    assert lost["awq"] < 0.9 * lost["rtn"], lost
