"""Factors of input channels in training: the float function stays, gradients follow the chain, it lowers exactly."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.backends import cpu
from qpass.qat import float_model, fused, switch
from qpass.qat.channels import carried, scaled, undone
from qpass.qat.dynamic import fake_quantize_dynamic
from qpass.qat.fake_quantize import fake_quantize
from qpass.qat.sites import quantizers
from qpass.qat.subgradients.ewgs import EWGS
from qpass.qat.subgradients.lsq_plus import LSQ_PLUS
from qpass.qat.training import lowered, trained_plan
from qpass.qtype import QType
from tests.models import relative
from tests.models_training import Outliers, grads, prepared

X = torch.randn(8, 6, 32, generator=torch.Generator().manual_seed(3))
SCHEMES = ("w4a4", "w8a8", "w4a8")


def step(t, lr=0.01):
    """One step towards noise, after which weights, steps and offsets have moved."""
    optimizer = torch.optim.SGD(t.parameters(), lr=lr)
    (t(X) - 0.3).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return t.eval()


def compiled_as_trained(t):
    """What is compiled computes what t does in eval mode."""
    with torch.no_grad():
        wanted = t(X)
    assert relative(qpass.compile(t, backend="reference")(X), wanted) < 1e-5
    if cpu.unavailable() is None:
        assert relative(qpass.compile(t, backend="cpu")(X), wanted) < 2e-2


def test_the_float_function_stays():
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    v, c = torch.rand(6) + 0.1, 10 * torch.randn(6)
    of_input, of_weight = (v, v * c), (1 / v, None)
    product = F.linear(scaled(x, of_input), scaled(weight, of_weight), carried(scaled(weight, of_weight), v * c))
    torch.testing.assert_close(product, F.linear(x, weight), rtol=1e-5, atol=1e-5)  # v, c are float32
    torch.testing.assert_close(undone(scaled(x, of_input), of_input), x)

    t = prepared(Outliers(), "w4a4", X).eval()
    rounded, twin = t(X), float_model(t)
    switch(t, False)
    assert torch.equal(t(X), twin(X))
    assert not torch.equal(t(X), rounded)
    switch(t, True)
    assert torch.equal(t(X), rounded)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-dynamic"])
def test_gradients_follow_the_chain(scheme):
    t = prepared(Outliers(), scheme, X, start="rounded")
    layer = t.block.up
    of_weight, of_input = layer.used
    v, c = of_input.factor, of_input.shift
    assert torch.equal(of_weight.factor, v)
    assert float(v.max() / v.min()) > 3
    x, g = t.block.norm(X).detach(), torch.randn(8, 6, 96)
    ours = x.clone().requires_grad_()
    layer(ours).backward(g)
    found = {"x": ours.grad, "bias": layer.bias.grad, "weight": layer.weight.grad}

    inner, weight = (x * v - c * v).requires_grad_(), (layer.weight / v).detach().requires_grad_()
    if of_input.dynamic:
        q = fake_quantize_dynamic(inner, of_input.type, log_clip=of_input.log_clip, rule=LSQ_PLUS)
    else:
        q = fake_quantize(inner, of_input.log_step.exp(), of_input.offset, of_input.type, LSQ_PLUS)
    w = fake_quantize(weight, of_weight.log_step.exp(), None, of_weight.type, LSQ_PLUS, parameter=True)
    F.linear(q, w, layer.bias.detach() + w @ (c * v)).backward(g)
    torch.testing.assert_close(found["x"], inner.grad * v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["weight"], weight.grad / v, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["bias"], g.sum((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["u4/t", "i4/g8"])
def test_one_kernel_computes_the_same(text, monkeypatch):
    qtype, generator = QType.parse(text), torch.Generator().manual_seed(1)
    x, g = (torch.randn(48, 96, generator=generator) for _ in range(2))
    channels = (torch.rand(96, generator=generator) + 0.5, torch.randn(96, generator=generator))
    size = torch.full((48, 12), 0.3) if qtype.group else torch.tensor(0.3)
    offset = None if qtype.signed else torch.tensor(7.0)
    found = []
    for large in (1 << 60, 1):
        monkeypatch.setattr(fused, "LARGE", large)
        leaves = [x.clone().requires_grad_(), size.clone().requires_grad_()]
        y = fake_quantize(*leaves, offset, qtype, EWGS, parameter=qtype.signed, channels=channels)
        y.backward(g)
        found.append([y.detach(), *(t.grad for t in leaves)])
    assert not fused._BROKEN
    for plain, one in zip(*found, strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)
    inner = scaled(x, channels).requires_grad_()  # and both are what is multiplied before, by itself
    y = fake_quantize(inner, size, offset, qtype, EWGS, parameter=qtype.signed)
    y.backward(g)
    assert torch.equal(found[0][0], y.detach())
    torch.testing.assert_close(found[0][1], inner.grad * channels[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", [*SCHEMES, "w4a4-g8-dynamic"])
def test_lowers_to_what_was_trained(scheme, bias):
    t = step(prepared(Outliers(bias), scheme, X, start="rounded"))
    _, plan = lowered(t)
    for d in plan.quantized:
        layer = t.get_submodule(d.site.partition(":")[0])
        assert d.input_extra is None
        if d.packed.in_mul is not None:
            assert torch.equal(d.packed.in_mul, layer.used[1].factor)
            assert torch.equal(d.input_shift, layer.used[1].shift)
            assert d.bias.shape == (len(layer.weight),)
    assert sum(d.input_shift is not None for d in plan.quantized) >= 5
    compiled_as_trained(t)


class Turned(nn.Module):
    """GPT-2's linear: a forward of its own, its weight held as [K, N]."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 16) / 6), nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 32), self.weight).view(*x.shape[:-1], 16)


def test_a_forward_of_its_own():
    norm = nn.LayerNorm(32)
    norm.bias.data[5], norm.weight.data[5] = 30.0, 20.0
    t = prepared(nn.Sequential(norm, Turned()), "w4a4", X)
    assert t[1].used[1].factor is not None
    assert t[1].used[0].type.axis == 1
    t = step(t)
    compiled_as_trained(t)
    switch(t, False)
    assert torch.equal(t(X), float_model(t)(X))


def test_factors_for_the_weights_sake():
    """solver=awq beside inputs that stay float: no quantizer of inputs, and the weight's own factors."""
    t = step(prepared(Outliers(), "w4a16-g8,solver=awq", X))
    assert any(q.factor is not None for q in quantizers(t))
    compiled_as_trained(t)


@pytest.mark.parametrize(("scheme", "share"), [("w4a4", 0.9), ("w8a8", 0.1)])
def test_it_starts_better_than_without(scheme, share):
    model = Outliers().eval()
    with torch.no_grad():
        wanted, losses = model(X), []
        for text in (scheme, f"{scheme},smooth=none"):
            losses.append(float((qpass.prepare_qat(model, text, X, start="rounded")(X) - wanted).square().mean()))
    assert losses[0] < share * losses[1]


def test_words_that_leave_them_out():
    for options in (
        dict(scheme="w4a4,smooth=none"),
        dict(scheme="w4a4", start="published"),
        dict(scheme="w4a4", start="steps"),
        dict(scheme="w4a4-dynamic"),
        dict(scheme="w4a16-g8"),
    ):
        t = qpass.prepare_qat(Outliers(), example_inputs=X, **options)
        assert all(q.factor is q.shift is None for q in quantizers(t))
        assert not any(name.endswith((".factor", ".shift")) for name in t.state_dict())
    t = qpass.prepare_qat(Outliers(), "w4a4-dynamic,smooth=0.5", X)
    assert t.block.up.used[1].factor is not None  # it was asked for
    t = qpass.prepare_qat(Outliers(), "w4a4", X, recipe={"block.up": "w4a4,smooth=none"})
    assert t.block.up.used[1].factor is None
    assert t.attention.q.used[1].factor is not None


def test_readers_under_two_schemes_have_quantizers_of_their_own():
    t = prepared(Outliers(), "w4a4", X, recipe={"attention.k": "w8a8"})
    assert t.attention.q.used[1] is t.attention.v.used[1]
    assert str(t.attention.k.used[1].type) == "u8/t"
    step(t)
    compiled_as_trained(t)


def test_they_are_constants_that_go_where_the_model_goes():
    t = step(prepared(Outliers(), "w4a4", X))
    with torch.no_grad():
        wanted = t(X)
    file = io.BytesIO()
    torch.save(t.state_dict(), file)
    file.seek(0)
    fresh = prepared(Outliers(), "w4a4", 2 * X + 1).eval()
    fresh.load_state_dict(torch.load(file))
    for same in (fresh, copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        with torch.no_grad():
            assert torch.equal(same(X), wanted)
    held = [q.factor for q in quantizers(t) if q.factor is not None]
    assert len({f.untyped_storage().data_ptr() for f in held}) == len(held), "safetensors takes no shared memory"
    assert not {"factor", "shift"} & {n.rpartition(".")[2] for n, _ in t.named_parameters()}
    assert t.bfloat16().block.up.used[1].factor.dtype == torch.float32
    t.double()
    assert relative(t(X.double()), wanted) < 0.05
    assert all(d.packed.in_mul.dtype == torch.float32 for d in trained_plan(t).quantized if d.input_shift is not None)


def test_checkpoints_without_factors_and_with():
    with_them, without = (prepared(Outliers(), scheme, X) for scheme in ("w4a4", "w4a4,smooth=none"))
    site = r"attention.q:linear.0.weight: the checkpoint has "
    with pytest.raises(qpass.QpassError, match=site + "no factors of its input channels, this model has them"):
        with_them.load_state_dict(without.state_dict())
    with pytest.raises(qpass.QpassError, match=site + "the factors of its input channels, this model has none.*smooth"):
        without.load_state_dict(with_them.state_dict())
    with_them.load_state_dict(Outliers().state_dict(), strict=False)


def test_bf16_autocast_and_a_write_to_buffers_between_passes():
    t = prepared(Outliers(), "w4a4", X)
    with torch.no_grad():
        wanted = t(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert t.block.up(X).dtype == torch.bfloat16
        found = t(X)
    assert relative(found, wanted) < 0.1
    with torch.no_grad():
        for buffer in t.buffers():
            buffer.copy_(buffer.clone())  # as DistributedDataParallel does before the next forward pass
    found.float().square().mean().backward()
    assert all(torch.isfinite(g).all() for g in grads(t).values())
