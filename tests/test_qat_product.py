"""The product of a fake-quantized input: torch's own result and gradients, of codes kept in place of values."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qpass.qat import switch
from qpass.qat.arithmetic import forward, values
from qpass.qat.product import linear
from qpass.qtype import QType
from tests.models_training import Gated, grads, loss_of, prepared

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("text", ["u8/t", "u4/t", "i4/t", "i8/t", "u2/t"])
def test_values_come_back_to_the_last_bit(text, dtype):
    qtype = QType.parse(text)
    x = torch.randn(5, 33).to(dtype)
    zero = None if qtype.symmetric else torch.tensor(float(qtype.qmax // 3))
    step = torch.tensor(3.1 / qtype.qmax)
    y, _, q = forward(x, step, zero, qtype, dtype, True, whole=True)
    assert q.dtype.itemsize == 1
    assert torch.equal(values(q, step, zero, qtype, dtype), y)


def codes_change_nothing(t, x, autocast, **tolerance):
    """The first layer's result is the same, and its gradients are nearly, whether codes are kept or values."""

    def run(coded):
        t[0].used[1].coded = coded
        t.zero_grad()
        value = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = t(value)
        y.float().square().sum().backward()
        return y, value.grad, grads(t)

    (one, to_x, found), (two, wanted_to_x, wanted) = run(True), run(False)
    assert torch.equal(one, two)
    torch.testing.assert_close(to_x, wanted_to_x, **tolerance)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("shape", [(4, 6, 16), (7, 16), (16,), (0, 16)])
def test_gradients_are_those_of_the_plain_product(shape, autocast, bias):
    t = prepared(nn.Sequential(nn.Linear(16, 11, bias=bias)), "w4a4", X)
    x = torch.randn(shape)

    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    codes_change_nothing(t, x, autocast, **tolerance)


def kept(function):
    """Bytes that a forward pass keeps for its backward pass, each storage once."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result.requires_grad
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def test_two_bytes_an_element_are_kept():
    t = prepared(nn.Sequential(nn.Linear(64, 8)), "w4a4", torch.randn(512, 64))
    x = torch.randn(512, 64, requires_grad=True)
    of_weights = 1 << 14
    assert kept(lambda: t(x)) <= 2 * x.numel() + of_weights
    t[0].used[1].coded = False
    assert kept(lambda: t(x)) >= 5 * x.numel()


def test_a_frozen_weight_keeps_no_values():
    t = prepared(nn.Sequential(nn.Linear(64, 8)), "w4a4", torch.randn(512, 64))
    t[0].weight.requires_grad_(False)
    t[0].weight_quantizer.requires_grad_(False)
    x = torch.randn(512, 64, requires_grad=True)
    assert kept(lambda: t(x)) <= 2 * x.numel() + (1 << 14)


CONVOLUTIONS = {
    "plain": (nn.Conv1d, (6, 7, 3), {}),
    "stride": (nn.Conv1d, (6, 4, 3), {"stride": 2, "padding": 1, "bias": False}),
    "groups": (nn.Conv2d, (6, 9, (3, 5)), {"groups": 3, "padding": (0, 2), "stride": (1, 2)}),
    "depthwise": (nn.Conv2d, (6, 6, 3), {"groups": 6, "padding": 1}),
    "same": (nn.Conv2d, (6, 4, 3), {"padding": "same", "dilation": 2}),
    "one side": (nn.Conv2d, (6, 4, 2), {"padding": "same"}),
    "valid": (nn.Conv2d, (6, 4, 1), {"padding": "valid"}),
    "reflect": (nn.Conv2d, (6, 4, 3), {"padding": 1, "padding_mode": "reflect"}),
    "three axes": (nn.Conv3d, (6, 4, (1, 3, 2)), {"padding": (0, 1, 1)}),
}


@pytest.mark.parametrize("batch", [(3,), (), (0,)])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_are_those_of_the_plain_convolution(name, autocast, batch):
    kind, sizes, options = CONVOLUTIONS[name]
    layer = kind(*sizes, **options)
    shape = (6, 8, 9, 5)[: len(layer.kernel_size) + 1]
    t = prepared(nn.Sequential(layer), "w4a4", torch.randn(4, *shape))
    x = torch.randn(*batch, *shape)

    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    codes_change_nothing(t, x, autocast, **tolerance)


def test_two_bytes_an_element_of_an_image_are_kept():
    t = prepared(nn.Sequential(nn.Conv2d(16, 4, 3, padding=1)), "w2a2", torch.randn(4, 16, 20, 20))
    x = torch.randn(4, 16, 20, 20, requires_grad=True)
    of_weights = 1 << 13
    assert kept(lambda: t(x)) <= 2 * x.numel() + of_weights
    t[0].used[1].coded = False
    assert kept(lambda: t(x)) >= 5 * x.numel()


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid()])
def test_what_an_activation_keeps_anyway_is_not_kept_twice(act):
    """Its result, and a byte an element beside; gradients are those of codes, but for their rounding of residuals."""
    t = prepared(nn.Sequential(nn.Conv2d(16, 16, 1), act, nn.Conv2d(16, 4, 3)), "w4a4", torch.randn(8, 16, 26, 26))
    x = torch.randn(8, 16, 26, 26)
    hidden, of_weights = 8 * 16 * 26 * 26, 1 << 14
    assert kept(lambda: t(x)) <= 2 * x.numel() + 5 * hidden + of_weights
    t(x).square().sum().backward()
    of_kept = grads(t)
    t.zero_grad()
    apart = t[2](1 * t[1](t[0](x)))
    apart.square().sum().backward()
    for name, grad in grads(t).items():
        torch.testing.assert_close(of_kept[name], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()))


class Written(nn.Module):
    """Writes to what its layers give, as wav2vec2 does to mask frames."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        y[:, 1] = 0.0
        return y.mul_(2)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8-g8-dynamic"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(16, 11), (4, 6, 16)),
        (nn.Linear(16, 11, bias=False), (4, 6, 16)),
        (nn.Conv1d(16, 11, 3), (4, 16, 9)),
        (nn.Conv2d(16, 11, 3), (4, 16, 9, 9)),
    ],
    ids=["linear", "no bias", "conv1d", "conv2d"],
)
def test_a_model_may_write_to_the_result(layer, shape, scheme):
    if scheme != "w4a4" and not isinstance(layer, nn.Linear):
        scheme = "w4a8-dynamic"
    x = torch.randn(shape)
    t = prepared(Written(layer), scheme, x)
    y = t(x.requires_grad_())
    y.square().sum().backward()
    apart = t.layer(x).clone()
    apart[:, 1] = 0.0
    assert torch.equal(y, apart.mul_(2))
    found = grads(t)
    t.zero_grad()
    apart.square().sum().backward()
    for name, grad in grads(t).items():
        torch.testing.assert_close(found[name], grad)


class Doubled(nn.Conv2d):
    """A convolution of a user's, with code of its own."""

    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


def test_a_convolution_of_another_kind_runs_its_own_code():
    x = torch.randn(2, 3, 8, 8)
    t = prepared(nn.Sequential(Doubled(3, 5, 3)), "w8a8", x)
    wanted = 2 * F.conv2d(t[0].used[1](x), t[0].used[0](t[0].weight), t[0].bias)
    torch.testing.assert_close(t(x.requires_grad_()), wanted)


def test_a_module_with_a_forward_of_its_own_keeps_no_codes():
    t = prepared(nn.Sequential(nn.ConvTranspose1d(6, 6, 3)), "w4a4", X)
    assert not t[0].used[1].coded
    assert not hasattr(t[0].used[1](X.clone().requires_grad_()), "codes")


def test_checkpointing_and_a_value_without_codes():
    t = prepared(Gated(), "w4a4", X)
    torch.manual_seed(0)
    loss_of(t, X).backward()
    plain = grads(t)
    t.zero_grad()
    torch.manual_seed(0)
    loss_of(lambda x: checkpoint(t, x, use_reentrant=False), X).backward()
    for name, grad in grads(t).items():
        torch.testing.assert_close(grad, plain[name])
    weight = torch.randn(3, 16, requires_grad=True)
    assert torch.equal(linear(X, weight, None), F.linear(X, weight))
    switch(t, False)
    assert not hasattr(t.up.used[1](X.clone().requires_grad_()), "codes")
