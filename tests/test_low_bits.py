"""Weights of 2 to 8 bits in channels and groups, inputs of 2 to 8 bits, in whole models."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import qpass
from qpass.backends import native
from qpass.inspect.errors import site_errors
from tests.models import FeedForward, batches, encoder, relative

WIDE = 128  # one group of the default size


def run(model, x):
    with torch.no_grad():
        return model(x)


def error(model, scheme, data, backend="reference"):
    """Error of a scheme on data that calibration has not seen."""
    q = qpass.compile(model, scheme, example_inputs=data[0], calibration=data[:-1], backend=backend)
    assert qpass.inspect(q).plan.quantized
    return relative(run(q, data[-1]), run(model, data[-1]))


@pytest.mark.parametrize("make", [lambda: encoder(1, WIDE), lambda: FeedForward(WIDE, 3 * WIDE).eval()])
def test_error_falls_as_bits_rise(make):
    model, data = make(), batches(5, (4, 16, WIDE))
    found = {
        scheme: error(model, scheme, data)
        for scheme in ("w2a8", "w4a8", "w8a8", "w8a2", "w8a4", "w2a16", "w4a16", "w8a16")
    }
    for schemes in (("w2a8", "w4a8", "w8a8"), ("w8a2", "w8a4", "w8a8"), ("w2a16", "w4a16", "w8a16")):
        assert all(found[b] < 0.6 * found[a] for a, b in itertools.pairwise(schemes)), found


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("w4a8", 0.04), ("w4a8-dynamic", 0.04), ("w4a8-g32", 0.04), ("w4a8-c,solver=rtn,smooth=none", 0.05), ("w4a4", 0.08),
     ("w8a4-dynamic", 0.07), ("w4a16", 0.04), ("w6a6", 0.03)],
)  # fmt: skip
def test_close_to_float(scheme, bound):
    assert error(encoder(1, WIDE), scheme, batches(5, (4, 16, WIDE))) < bound


def test_gptq_beats_rounding_to_nearest_beside_float_inputs():
    x = [torch.randn(256, WIDE) @ torch.randn(WIDE, WIDE)] * 2
    model = nn.Sequential(nn.Linear(WIDE, 48)).eval()
    for scheme in ("w4a16", "w3a16-c", "w2a16-g32"):
        assert error(model, scheme, x) < 0.9 * error(model, f"{scheme},solver=rtn", x)


def test_groups_that_do_not_fit_become_channels_and_the_plan_says_so():
    plan = qpass.analyze(FeedForward().eval(), "w4a8", batches()[0], batches())
    assert {str(d.weight_type) for d in plan.quantized} == {"i4/c0"}
    assert "its 96 inputs are no multiple of the group of 128: its weight has a scale for each output" in str(plan)
    assert str(qpass.analyze(FeedForward().eval(), "w4a16", batches()[0])["down:linear.0"].weight_type) == "i4/c0"
    assert str(qpass.analyze(FeedForward().eval(), "w2a16", batches()[0])["down:linear.0"].weight_type) == "u2/c0"


class Transposed(nn.Module):
    """A weight held as [K, N], as GPT-2 has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, 24))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("scheme", ["w4a8", "w2a8", "w4a16"])
def test_a_weight_held_the_other_way_round(scheme, tmp_path):
    model, data = Transposed().eval(), batches(4, (40, WIDE))
    q = qpass.compile(model, scheme, data[0], data, backend="reference")
    d = qpass.inspect(q).plan.quantized[0]
    assert d.packed.data.shape == (WIDE, 24)
    assert d.packed.type.axis == 1
    assert "held as [K, N]" in d.note
    assert relative(run(q, data[0]), run(model, data[0])) < (0.4 if scheme == "w2a8" else 0.12)
    qpass.save(q, tmp_path / "model")
    loaded = qpass.load(tmp_path / "model", Transposed().eval(), backend="reference")
    assert torch.equal(run(loaded, data[1]), run(q, data[1]))


class Tied(nn.Module):
    """A table that is looked up and multiplied by."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, WIDE)
        self.head = nn.Linear(WIDE, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, i):
        return self.head(torch.tanh(self.table(i)))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "w4a8-c"])
def test_a_tied_table_reads_only_its_rows(scheme):
    model, data = Tied().eval(), [torch.randint(0, 50, (4, 9)) for _ in range(4)]
    q = qpass.compile(model, scheme, data[0], data, recipe={"head": scheme}, backend="reference")
    assert relative(run(q, data[1]), run(model, data[1])) < 0.2
    assert "aten.embedding(@table.parametrizations.weight.original0, " in qpass.inspect(q).graph("fused")


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8-dynamic", "w4a4-g32", "w4a16", "w2a8", "w3a16-c"])
def test_save_and_load_bit_for_bit(scheme, tmp_path):
    model, data = FeedForward(WIDE, 2 * WIDE).eval(), batches(3, (2, 5, WIDE))
    q = qpass.compile(model, scheme, data[0], data, backend="reference")
    plan = qpass.inspect(q).plan
    assert {d.packed.zero is None for d in plan.quantized} == {qpass.Scheme.parse(scheme).weight.symmetric}
    qpass.save(q, tmp_path / "model")
    loaded = qpass.load(tmp_path / "model", FeedForward(WIDE, 2 * WIDE).eval(), backend="reference")
    assert torch.equal(run(loaded, data[1]), run(q, data[1]))
    assert loaded.state_dict().keys() == q.state_dict().keys()
    plan.save(tmp_path / "plan")
    again = qpass.compile(model, plan=qpass.Plan.load(tmp_path / "plan"), backend="reference")
    assert torch.equal(run(again, data[1]), run(q, data[1]))
    assert str(plan.quantized[0].weight_type) in str(plan)


def test_weight_only_equals_packed_eager():
    model, data = FeedForward(WIDE, 2 * WIDE).eval(), batches(2, (2, 5, WIDE))
    for scheme in ("w4a16", "w4a16-c", "w2a16-g32"):
        q = qpass.compile(model, scheme, data[0], backend="reference")
        torch.testing.assert_close(run(q, data[1]), q._call_impl(data[1]), rtol=1e-4, atol=1e-5)


def test_a_recipe_mixes_schemes():
    model, data = encoder(1, WIDE), batches(5, (4, 16, WIDE))
    recipe = {"0.*": "w8a8", "1.up": "w4a8", "1.down": "w4a16"}
    plan = qpass.analyze(model, "w8a8", data[0], data[:-1], recipe=recipe)
    types = {d.site.partition(":")[0]: (str(d.input_type or ""), str(d.weight_type)) for d in plan.quantized}
    assert types["0.q"] == ("u8/t", "i8/c0")
    assert types["1.up"] == ("u8/t", "i4/g128")
    assert types["1.down"] == ("", "u4/g128")
    q = qpass.compile(model, plan=plan, backend="reference")
    assert relative(run(q, data[-1]), run(model, data[-1])) < 0.03


def test_static_inputs_of_four_bits_are_clipped():
    model, data = FeedForward(WIDE, 2 * WIDE).eval(), batches(4, (8, 16, WIDE))
    plan = qpass.analyze(model, "w8a4", data[0], data)
    down = plan["down:linear.0"]
    assert str(down.input_type) == "u4/t"
    assert 0 <= int(down.input_zero) <= 15
    assert float(down.input_scale) * 15 < down.hi - down.lo
    q = qpass.compile(model, plan=plan, example_inputs=data[0], backend="reference")
    assert "u4/t" in qpass.inspect(q).graph("fused")


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4", "w2a8", "w4a8-c-dynamic"])
def test_numeric_check_holds_for_every_pass(scheme, monkeypatch):
    monkeypatch.setenv("QPASS_CHECK", "numeric")
    data = batches(4, (4, 8, WIDE))
    qpass.compile(FeedForward(WIDE, 2 * WIDE).eval(), scheme, data[0], data, backend="reference")


def test_a_norm_behind_a_weight_with_zero_points():
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(16))
        model[1].running_var.uniform_(0.5, 2)
    data = [torch.randn(32, 32) for _ in range(4)]
    for scheme, bound in (("w2a8", 0.5), ("w4a8", 0.1)):
        assert error(model, scheme, data) < bound


def test_the_cpu_backend_runs_what_it_can_and_says_what_it_cannot():
    model, data = FeedForward(WIDE, 2 * WIDE).eval(), batches(4, (4, 16, WIDE))
    groups = None if native.unavailable() is None and native.has_attention() else "not i4/g128"
    for scheme, kept in (("w4a8-c", None), ("w4a8", groups), ("w4a8-g16", "not i4/g16"), ("w8a4", None)):
        plan = qpass.analyze(model, scheme, data[0], data)
        reference = qpass.compile(model, plan=plan, backend="reference")
        cpu = qpass.compile(model, plan=plan, example_inputs=data[0], backend="cpu")
        found = [why for site, why in qpass.inspect(cpu).record(0).kept if "linear" in site]
        assert (not found) if kept is None else all(why.endswith(kept) for why in found) and len(found) == 2
        assert relative(run(cpu, data[1]), run(reference, data[1])) < 0.01


def test_the_guard_times_them():
    model, data = nn.Sequential(nn.Linear(WIDE, 16)).eval(), [torch.randn(4, WIDE) for _ in range(2)]
    for scheme in ("w4a8", "w4a8-c-dynamic", "w4a4-dynamic", "w4a16", "w2a8"):
        q = qpass.compile(model, scheme, data[0], data, backend="cpu", guard=True)
        d = qpass.inspect(q).plan["0:linear.0"]
        assert d.quantized or "float is faster here" in d.why


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("scheme", ["fp8", "fp8-static"])
def test_float_types(scheme, backend, tmp_path):
    """3 bits behind the point: an error of 2^-4 / sqrt(3) at most for each operand, through every backend and the disk."""
    model, data = FeedForward().eval(), batches()
    q = qpass.compile(model, scheme, data[0], data, backend=backend)
    assert [str(d.weight_type) for d in qpass.inspect(q).plan.quantized] == ["e4m3/c0"] * 2
    with torch.no_grad():
        wanted, found = model(data[0]), q(data[0])
    assert float((found - wanted).norm() / wanted.norm()) < 0.06
    assert q.up.parametrizations.weight.original0.dtype is torch.float8_e4m3fn
    qpass.save(q, tmp_path / "saved")
    again = qpass.load(tmp_path / "saved", FeedForward().eval())
    with torch.no_grad():
        assert float((again(data[0]) - found).norm() / found.norm()) < 1e-2


def test_site_errors_read_groups_and_zero_points():
    model, data = FeedForward(WIDE, 2 * WIDE).eval(), batches(3, (4, 16, WIDE))
    for scheme in ("w4a8", "w4a16", "w2a8-dynamic"):
        found = site_errors(model, qpass.analyze(model, scheme, data[0], data), data[0])
        assert len(found) == 2
        assert all(e.sqnr > 5 for e in found)


def test_gelu_that_two_types_read():
    """Two readers of one value with inputs of other types: each has a quantize of its own."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDE, 8), nn.Linear(WIDE, 8)

        def forward(self, x):
            y = functional.gelu(x)
            return self.a(y) + self.b(y)

    model, data = Two().eval(), batches(4, (16, WIDE))
    plan = qpass.analyze(model, "w8a8", data[0], data, recipe={"b": "w8a4"})
    assert [str(d.input_type) for d in plan.quantized] == ["u8/t", "u4/t"]
    q = qpass.compile(model, plan=plan, backend="reference")
    assert relative(run(q, data[0]), run(model, data[0])) < 0.15
