"""Models that are not ready, of unusual numbers or interrupted: refused with a sentence, or working."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import qpass
from qpass.errors import QpassError
from tests.models import FeedForward, encoder, relative
from tests.untouched import untouched

X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))


def model():
    return FeedForward().eval()


def build(m, scheme="w8a8", x=X, backend="reference", **arguments):
    calibration = [x] if scheme.startswith("w8a8") else None
    return qpass.compile(m, scheme, example_inputs=x, calibration=calibration, backend=backend, **arguments)


def results(q, m, x=X):
    with torch.no_grad():
        return q(x), m(x)


def on_meta():
    with torch.device("meta"):
        return model()


def half_trained():
    m = nn.Sequential(model(), nn.Dropout(0.5)).eval()
    m[1].train()
    return m


def method_compiled():
    m = model()
    m.compile(backend="eager")
    return m


class Products(nn.Module):
    def forward(self, x):
        return torch.matmul(x, x.mT)


def holding_nan():
    m = model()
    m.up.weight.data[0, 0] = float("nan")
    return m


NOT_READY = (
    ("meta device", on_meta, "norm.weight is on the meta device.*load the weights"),
    ("training", FeedForward, r"FeedForward is in training mode; call model.eval\(\)"),
    ("a module in training", half_trained, r"'1' of this Sequential is in training mode; call model.eval\(\)"),
    ("compiled by its method", method_compiled, r"already compiled by model.compile\(\)"),
    ("compiled by qpass", lambda: build(model()), "already compiled by qpass; compile the float model"),
    ("part compiled by qpass", lambda: nn.Sequential(build(model())).eval(), "packed already; compile the float model"),
    ("nothing to quantize", lambda: nn.Sequential(nn.ReLU()).eval(), "has no site to quantize.*no matrix product"),
    ("products alone", lambda: Products().eval(), r"has no site to quantize.*\(found: matmul\)"),
    ("NaN in a weight", holding_nan, "up.weight holds NaN or infinity"),
)


@pytest.mark.parametrize(("make", "message"), [c[1:] for c in NOT_READY], ids=[c[0] for c in NOT_READY])
def test_not_ready(make, message):
    m = make()
    with untouched(m), pytest.raises(QpassError, match=message):
        build(m)


def test_compiled_by_torch_compile():
    m = torch.compile(model(), backend="eager")
    with untouched(m._orig_mod), pytest.raises(QpassError, match=r"compiled by torch.compile; pass .*_orig_mod"):
        build(m)


def test_not_a_module():
    with pytest.raises(QpassError, match=r"model is a function; expected a torch.nn.Module"):
        build(lambda x: x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 32))
        self.register_buffer("fixed", torch.randn(4, 8))

    def forward(self, x):
        return functional.linear(functional.linear(x, self.w), self.fixed)


class Pair(nn.Module):
    """Two matrices of its own: which of them its inputs meet is seen when it runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return functional.linear(functional.linear(x, self.a), self.b)


def test_nothing_found_without_running():
    with pytest.raises(QpassError, match=r"no nn.Linear or convolution module; pass example_inputs"):
        qpass.compile(Pair().eval(), "w8a8-dynamic")
    with pytest.raises(QpassError, match=r"Embedding has no site to quantize.*found: embedding"):
        qpass.compile(nn.Embedding(9, 8).eval(), "w8a8-dynamic")


def test_a_buffer_as_weight_stays_float():
    m = Functional().eval()
    q = build(m)
    assert [d.why for d in qpass.inspect(q).plan] == ["", "its weight is a buffer of the model, not a parameter"]
    assert relative(*results(q, m)) < 0.03


EXTREMES = (
    ("zeros", lambda x: x * 0),
    ("constant", lambda x: x * 0 + 3),
    ("dead channels", lambda x: x * (torch.arange(32) > 4)),
    ("denormal", lambda x: x * 1e-40),
    ("far from zero", lambda x: 1000.1 + 1e-3 * x),
    ("one of 1e30", lambda x: x.index_fill(0, torch.tensor([0]), 1e30)),
    ("all of 1e37", lambda x: x.clamp(-3, 3) * 1e37),
)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16", "w8a8,range=mse,smooth=none,solver=rtn"])
@pytest.mark.parametrize("change", [c[1] for c in EXTREMES], ids=[c[0] for c in EXTREMES])
def test_extreme_activations(change, scheme):
    m, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval(), change(X)
    with untouched(m):
        found, wanted = results(build(m, scheme, x), m, x)
    assert torch.isfinite(found).all()
    assert relative(found, wanted) < 0.03


WEIGHTS = (
    ("all zero", lambda w: w.zero_()),
    ("a row of zeros", lambda w: w[0].zero_()),
    ("a column of zeros", lambda w: w[:, 0].zero_()),
    ("a denormal row", lambda w: w[0].mul_(1e-40)),
    ("one of 1e30", lambda w: w[0, 0].fill_(1e30)),
)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16"])
@pytest.mark.parametrize("change", [c[1] for c in WEIGHTS], ids=[c[0] for c in WEIGHTS])
def test_extreme_weights(change, scheme):
    m = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    with torch.no_grad():
        change(m[0].weight)
    found, wanted = results(build(m, scheme), m)
    assert torch.isfinite(found).all()
    assert relative(found, wanted) < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_other_floats_keep_their_dtype(scheme, dtype):
    m, x = model().to(dtype), X.to(dtype)
    q = build(m, scheme, x)
    assert len(qpass.inspect(q).plan.quantized) == 2
    for found in (results(q, m, x)[0], q._call_impl(x)):
        assert found.dtype == dtype
        assert relative(found, results(m, m, x)[0]) < 0.03


def test_double_precision_on_the_cpu_backend():
    m, x = model().double(), X.double()
    found, wanted = results(build(m, "w8a8", x, "cpu"), m, x)
    assert found.dtype == torch.float64
    assert relative(found, wanted) < 0.03


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn, self.down = nn.Linear(32, 32, dtype=torch.complex64), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(self.turn(x.to(torch.complex64)).abs())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_complex_stays_float(scheme):
    m = Complex().eval()
    q = build(m, scheme)
    plan = qpass.inspect(q).plan
    assert plan["turn:linear.0"].why == "its weight is complex64, schemes quantize real floating-point weights"
    assert plan["down:linear.0"].quantized
    assert relative(*results(q, m)) < 0.03


def test_a_second_compile_is_independent():
    m = model()
    with untouched(m):
        first = build(m, "w8a8")
        before = results(first, m)[0]
        second = build(m, "w8a16")
        assert relative(*results(second, m)) < 0.03
    assert torch.equal(results(first, m)[0], before)
    assert copy.deepcopy(m)(X).shape == before.shape


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = model()
        self.b = self.a
        self.c = nn.Linear(32, 32)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_a_submodule_used_twice(scheme):
    m = Twice().eval()
    with untouched(m):
        q = build(m, scheme)
    assert q.a is q.b
    assert len(qpass.inspect(q).plan.quantized) == 5
    assert relative(*results(q, m)) < 0.03


def test_an_encoder_in_place_is_the_same_object():
    m = encoder()
    wanted = m(X).detach()
    q = qpass.compile(m, "w8a8", X, [X], backend="reference", inplace=True)
    assert q is m
    with torch.no_grad():
        assert relative(q(X), wanted) < 0.03
