"""A model prepared for training: the plan's sites, codes and steps at the start, and lowered with those of the end."""

import copy

import pytest
import torch
from torch import nn

import qpass
from qpass.qat.quantizer import EMA
from qpass.qat.sites import quantizers, trained_modules
from qpass.qat.subgradients import METHODS
from qpass.qat.training import lowered
from tests.models import relative

SCHEMES = ("w8a8", "w4a4", "w2a2", "w4a4-dynamic", "w4a16-g32", "w2a16-g32", "w3a8", "w6a16")


class Gated(nn.Module):
    """A linear, a gated pair that reads one value, and a batch norm behind a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.gate, self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).transpose(1, 2)
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def batch(count=8):
    return torch.randn(count, 3, 20)


def train(t, steps=4, lr=1e-3):
    """A few steps towards noise; every parameter of t moves."""
    optimizer = torch.optim.AdamW(qpass.qat.param_groups(t, lr))
    for _ in range(steps):
        x = batch()
        loss = (t(x) - torch.randn(8, 20, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return t


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lowers_to_what_was_trained(scheme):
    """Integers of the trained steps, on the exact backend: t.eval() to accumulator rounding."""
    x = batch()
    t = qpass.prepare_qat(Gated(), scheme, x)
    before = {name: p.detach().clone() for name, p in t.named_parameters()}
    train(t).eval()
    still = [name for name, p in t.named_parameters() if torch.equal(p.detach(), before[name])]
    assert not [name for name in still if not name.endswith("offset")]
    with torch.no_grad():
        wanted = t(x)
    q = qpass.compile(t, backend="reference")
    assert type(q) is Gated
    assert all(not isinstance(p, nn.Parameter) or p.is_floating_point() for p in q.state_dict().values())
    assert relative(q(x), wanted) < 1e-5
    _, plan = lowered(t)
    for d in plan.quantized:
        path = d.site.partition(":")[0]
        assert torch.equal(d.packed.scale, trained_modules(t)[path].used[0].log_step.detach().exp())


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_methods(method):
    x = batch()
    t = train(qpass.prepare_qat(Gated(), "w4a8", x, method=method)).eval()
    with torch.no_grad():
        wanted = t(x)
    assert relative(qpass.compile(t, backend="reference")(x), wanted) < 1e-5
    assert {q.rule.name for q in quantizers(t) if q.is_weight} == {method if method != "pact" else "ste"}


@pytest.mark.parametrize("scheme", ["w8a8", "w2a16-g32"])
def test_the_fast_backend_runs_it_too(scheme):
    x = batch()
    t = train(qpass.prepare_qat(Gated(), scheme, x)).eval()
    with torch.no_grad():
        wanted = t(x)
    assert relative(qpass.compile(t, backend="cpu", example_inputs=x)(x), wanted) < 2e-2


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4,smooth=none"])
def test_it_begins_where_the_plan_rounds_to(scheme):
    """start="rounded": the prepared model gives what qpass.compile gives, before any training."""
    model, x = Gated().eval(), batch()
    plan = qpass.analyze(model, f"{scheme},equalize=none,bias=none", x, [x])
    t = qpass.prepare_qat(model, scheme, x)
    assert not t.training
    _, own = lowered(t)
    for d in plan.quantized:
        assert torch.equal(own[d.site].packed.data, d.packed.data)
        torch.testing.assert_close(own[d.site].packed.scale, d.packed.scale)
        torch.testing.assert_close(own[d.site].input_scale, d.input_scale)
        assert torch.equal(own[d.site].input_zero, d.input_zero)
        if d.input_shift is None:
            assert own[d.site].packed.in_mul is own[d.site].input_shift is d.packed.in_mul is None
            continue
        assert torch.equal(own[d.site].packed.in_mul, d.packed.in_mul)
        assert torch.equal(own[d.site].input_shift, d.input_shift)
        torch.testing.assert_close(own[d.site].bias, d.bias, rtol=1e-4, atol=1e-5)
    assert any(d.input_shift is not None for d in plan.quantized) == (scheme == "w4a4")


def test_published_starts_leave_the_weights():
    model, x = Gated(), batch()
    t = qpass.prepare_qat(model, "w4a8", x, method="lsq", start="published")
    for name, p in model.named_parameters():
        assert torch.equal(p, t.get_parameter(name))
    step = t.down.weight_quantizer.log_step.exp()
    groups = model.down.weight.detach().abs()
    torch.testing.assert_close(step, 2 * groups.mean(1) / 7**0.5)


@pytest.mark.parametrize("scheme", ["w4a8-dynamic", "w4a8", "w2a8-dynamic"])
def test_starts_with_the_steps_of_compile(scheme):
    """Weights are moved where training was seen to do better so, and where it is asked for."""
    model, x = Gated(), batch()
    plan = qpass.analyze(model.eval(), f"{scheme},bias=none,smooth=none", x, [x])
    model.train()
    for start in ("auto", "steps", "rounded"):
        t = qpass.prepare_qat(model, scheme, x, start=start)
        moved = any(not torch.equal(p, t.get_parameter(name)) for name, p in model.named_parameters())
        assert moved == (start == "rounded" or (start == "auto" and scheme != "w4a8-dynamic"))
        if start == "steps":
            step = t.down.weight_quantizer.log_step.detach().exp()
            torch.testing.assert_close(step, plan.decisions["down:linear.0"].packed.scale)


def test_the_caller_keeps_the_model():
    model, x = Gated(), batch()
    before = copy.deepcopy(model.state_dict())
    t = qpass.prepare_qat(model, "w4a4", x)
    assert t is not model
    assert model.training
    assert t.training
    assert all(m.training for m in t.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    same = qpass.prepare_qat(model, "w4a4", x, inplace=True)
    assert same is model


def test_readers_of_one_value_share_its_step():
    t = qpass.prepare_qat(Gated(), "w4a4", batch())
    assert t.gate.used[1] is t.up.used[1]
    assert t.up.used[1] is not t.down.used[1]
    names = list(t.state_dict())
    assert sum("input_quantizer.log_step" in name for name in names) == 3
    assert "gate.input_quantizer.log_step" in names
    assert "up.input_quantizer.log_step" not in names


def test_parameters_keep_their_names_and_steps_have_groups_of_their_own():
    model = Gated()
    t = qpass.prepare_qat(model, "w4a4", batch())
    assert {n for n, _ in model.named_parameters()} < {n for n, _ in t.named_parameters()}
    weights, vectors, steps = qpass.qat.param_groups(t, 1e-3, 0.1, 1e-2, 1e-4)
    assert (weights["lr"], weights["weight_decay"]) == (1e-3, 0.1)
    assert vectors["weight_decay"] == 0
    assert (steps["lr"], steps["weight_decay"]) == (1e-2, 1e-4)
    assert sum(len(g["params"]) for g in (weights, vectors, steps)) == len(list(t.parameters()))
    assert {id(p) for p in steps["params"]} == {id(p) for q in quantizers(t) for p in q.parameters()}


def test_back_to_float():
    model, x = Gated().eval(), batch()
    t = qpass.prepare_qat(model, "w8a16", method="ste")
    back = qpass.qat.float_model(t)
    assert type(back.down) is nn.Linear
    assert torch.equal(back(x), model(x))
    assert set(back.state_dict()) == set(model.state_dict())
    assert trained_modules(t)


def test_recipes_and_what_stays_float():
    model, x = Gated(), batch()
    t = qpass.prepare_qat(model, "w4a4", x, recipe={"conv": "w8a8", "down": None})
    assert str(t.conv.weight_quantizer.type) == "i8/c0"
    assert type(t.down) is nn.Linear
    q = qpass.compile(t.eval(), backend="reference")
    assert "the recipe leaves it in float" in str(qpass.inspect(q))


def test_a_table_is_trained_where_it_is_named():
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32))
    x = torch.randint(50, (4, 7))
    t = qpass.prepare_qat(model, "w4a16-g32", x, recipe={"0": "w8a16"})
    assert str(t[0].weight_quantizer.type) == "i8/c0"
    t(x).square().mean().backward()
    assert t[0].weight_quantizer.log_step.grad.abs().sum() > 0
    with torch.no_grad():
        wanted = t.eval()(x)
    assert relative(qpass.compile(t, backend="reference")(x), wanted) < 1e-5


def test_ranges_of_inputs_follow_the_data_with_ste():
    x = batch()
    t = qpass.prepare_qat(Gated(), "w8a8", x, method="ste")
    wanted = t.conv.input_quantizer.high.clone()
    for _ in range(3):
        t(3 * x)
        wanted += EMA * (3 * x.max() - wanted)
    torch.testing.assert_close(t.conv.input_quantizer.high, wanted)
    t.eval()(9 * x)
    torch.testing.assert_close(t.conv.input_quantizer.high, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_prepared_model_can_be_cast(dtype):
    """Steps are used as float32 whatever the model is, so they lower to what was trained."""
    x = batch().to(dtype)
    t = qpass.prepare_qat(Gated(), "w4a16-c").to(dtype).eval()
    with torch.no_grad():
        wanted = t(x)
    _, plan = lowered(t)
    assert all(d.packed.scale.dtype == torch.float32 for d in plan.quantized)
    assert relative(qpass.compile(t, backend="reference")(x), wanted) < (1e-5 if dtype == torch.float64 else 2e-2)


def test_analyze_gives_the_trained_plan():
    """Not the float model's: it compiles, with the float weights, to what compile(t) gives."""
    x = batch()
    t = train(qpass.prepare_qat(Gated(), "w4a4", x)).eval()
    plan = qpass.analyze(t)
    assert len(plan.quantized) == len(trained_modules(t))
    with torch.no_grad():
        wanted = qpass.compile(t, backend="reference")(x)
        found = qpass.compile(qpass.qat.float_model(t), plan=plan, backend="reference")(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
