"""Compiled models against float, the reference backend, and packed eager; one graph for all shapes."""

import pytest
import torch
from torch import nn

import qpass
from qpass.runtime import runtime_of
from tests.models import Attention, FeedForward, batches, encoder, relative
from tests.processors import needs_bytes

SCHEMES = ("w8a8", "w8a8-dynamic", "w8a16", "w8a8,smooth=none,solver=rtn", "w8a8,range=mse,smooth=none")


def run(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_close_to_float(scheme):
    """On both backends, by one plan."""
    model, data = encoder(), batches()
    reference = qpass.compile(model, scheme, example_inputs=data[0], calibration=data, backend="reference")
    cpu = qpass.compile(model, plan=runtime_of(reference).plan, example_inputs=data[0], backend="cpu")
    for q in (reference, cpu):
        assert type(q) is type(model)
        for x in (data[0], torch.randn(1, 9, 32), torch.randn(7, 3, 32)):
            assert relative(run(q, x), run(model, x)) < 0.03


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_cpu_agrees_with_reference_up_to_a_step(scheme):
    model, data = FeedForward().eval(), batches()
    plan = qpass.analyze(model, scheme, data[0], data)
    reference = qpass.compile(model, plan=plan, backend="reference")
    cpu = qpass.compile(model, plan=plan, backend="cpu")
    for x in (data[0], torch.randn(2, 5, 32)):
        error = run(cpu, x) - run(reference, x)
        assert float(error.abs().max()) < 0.05  # a value on the edge of two codes may fall on either side
        assert relative(run(cpu, x), run(reference, x)) < 2e-3


def test_weight_only_equals_packed_eager():
    model, data = encoder(), batches()
    q = qpass.compile(model, "w8a16", example_inputs=data[0], backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(q(data[1]), q._call_impl(data[1]), rtol=1e-4, atol=1e-5)


def test_numeric_check_holds_for_every_pass(monkeypatch):
    monkeypatch.setenv("QPASS_CHECK", "numeric")
    data = batches()
    qpass.compile(encoder(), "w8a8", example_inputs=data[0], calibration=data, backend="cpu")
    qpass.compile(encoder(), "w8a8-dynamic", example_inputs=data[0], calibration=data, backend="cpu")


@needs_bytes
def test_feed_forward_stays_in_integers():
    model, data = FeedForward().eval(), batches()
    q = qpass.compile(model, "w8a8", example_inputs=data[0], calibration=data, backend="cpu")
    lowered = qpass.inspect(q).graph("lowered")
    products = [line for line in lowered.splitlines() if "qpass.packed_linear" in line or "onednn.qlinear" in line]
    assert len(products) == 2
    assert "gelu" in products[0]  # the activation goes from one product to the next as integers
    assert "# uint8" in products[0]
    assert "aten.gelu" not in lowered


def test_siblings_are_one_product():
    model, data = Attention().eval(), batches()
    q = qpass.compile(model, "w8a8", example_inputs=data[0], calibration=data, backend="cpu")
    fused = qpass.inspect(q).graph("fused")
    assert fused.count("qpass.linear(") == 2  # q, k and v are one
    assert fused.count("qpass.quantize(") == 2


def test_one_capture_serves_other_shapes():
    model, data = encoder(), batches()
    q = qpass.compile(model, "w8a8", example_inputs=data[0], calibration=data, backend="reference")
    for shape in ((2, 5, 32), (9, 17, 32), (3, 40, 32)):
        run(q, torch.randn(shape))
    assert len(runtime_of(q).records) == 1


def test_relu_channels_split_exactly():
    """A far channel of a ReLU is split without changing the function: the error is that of a small range."""
    model, data = FeedForward(act=torch.relu).eval(), batches(8)
    with torch.no_grad():
        model.up.weight[3] *= 30
        model.down.weight[:, 3] /= 30
    plan = qpass.analyze(model, "w8a8", data[0], data)
    assert plan["down:linear.0"].input_extra[3] > 0
    without = qpass.analyze(model, "w8a8,smooth=none,solver=rtn", data[0], data)
    errors = []
    for p in (plan, without):
        q = qpass.compile(model, plan=p, backend="reference")
        errors.append(relative(run(q, data[0]), run(model, data[0])))
    assert errors[0] < errors[1] / 2


def test_quantize_dynamic_and_the_torch_compile_spelling():
    model, x = encoder(), torch.randn(4, 6, 32)
    q = qpass.quantize_dynamic(model)
    assert relative(run(q, x), run(model, x)) < 0.03
    only = qpass.quantize_dynamic(model, {"0.q"})
    assert [d.site for d in runtime_of(only).plan.quantized] == ["0.q:linear.0"]
    other = encoder()
    other.load_state_dict(model.state_dict())
    compiled = torch.compile(other, backend="qpass", options={"scheme": "w8a8-dynamic", "backend": "reference"})
    assert relative(run(compiled, x), run(model, x)) < 0.03
    with pytest.raises(Exception, match="schema"):
        run(torch.compile(other, backend="qpass", options={"schema": "w8a8"}), x)


def images():
    """A network of every kind of convolution module, and a linear."""
    body = [nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2, groups=2)]
    body += [nn.Conv2d(6, 6, 3, groups=6, padding_mode="reflect", padding=1), nn.Flatten(2), nn.Conv1d(6, 4, 4, 4)]
    body += [nn.Unflatten(2, (4, 4, 4)), nn.Conv3d(4, 2, 2), nn.Flatten(), nn.Linear(54, 5)]
    return nn.Sequential(*body).eval()


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16"])
def test_convolutions_are_found_without_inputs(scheme):
    model, x = images(), torch.randn(2, 3, 8, 8)
    seen = qpass.analyze(model, scheme, x)
    plan = qpass.analyze(model, scheme)
    kinds = ("linear", "conv")
    assert [d.site for d in plan] == [d.site for d in seen if d.operation.startswith(kinds)]
    assert all(d.quantized for d in plan)
    assert all(torch.equal(plan[d.site].packed.data, d.packed.data) for d in seen.quantized)
    q = qpass.compile(model, scheme, backend="reference")
    assert relative(run(q, x), run(model, x)) < 0.05


def test_quantize_dynamic_of_convolutions():
    model = images()
    assert len(runtime_of(qpass.quantize_dynamic(model)).plan.quantized) == 6
    only = qpass.quantize_dynamic(model, {nn.Linear, nn.Conv1d})
    assert [d.site for d in runtime_of(only).plan.quantized] == ["6:conv1d.0", "10:linear.0"]


def test_guard_leaves_tiny_layers_in_float():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    q = qpass.compile(model, example_inputs=x)
    plan = runtime_of(q).plan
    assert not plan.quantized
    assert "float is faster here" in plan["0:linear.0"].why
    torch.testing.assert_close(run(q, x), run(model, x))
    noted = qpass.compile(model, "w8a8-dynamic", example_inputs=x)
    assert "float would be" in str(qpass.inspect(noted))
    assert runtime_of(noted).plan.quantized


class Short(nn.Module):
    """As many rows as there are whole 64s: a length for which kernels are made must not be taken for the real one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x):
        return torch.tanh(self.a(x))[:, : x.shape[1] // 64] * 2 + 1


def test_kernels_serve_every_size_or_are_not_used():
    torch.manual_seed(0)
    model = Short().eval()
    q = qpass.compile(model, "w8a16", example_inputs=torch.randn(2, 192, 16), backend="cpu")
    for length in (192, 130, 320):
        x = torch.randn(2, length, 16)
        assert relative(run(q, x), run(model, x)) < 0.03


@needs_bytes
def test_changed_weights_are_noticed():
    model, x = FeedForward().eval(), torch.randn(4, 6, 32)
    q = qpass.compile(model, "w8a8-dynamic", example_inputs=x, backend="cpu")
    with torch.no_grad():
        q.norm.weight.mul_(1.0)
        q.up.parametrizations.weight.original0.zero_()
    with pytest.warns(UserWarning, match="compile it again"):
        found = run(q, x)
    torch.testing.assert_close(found, run(lambda v: q._call_impl(v), x), rtol=1e-4, atol=1e-5)
