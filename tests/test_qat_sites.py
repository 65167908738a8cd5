"""Every kind of module that is fake-quantized: what is compiled computes what the trained model does in eval mode."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.qat import float_model, switch
from qpass.qat.sites import trained_modules
from qpass.qat.training import training_of
from tests.models import relative
from tests.models_training import Gated, prepared, quantized_calls


def moved(t, *args):
    """The model in eval mode after one step that moves weights, steps and offsets."""
    optimizer = torch.optim.SGD(t.parameters(), lr=0.02)
    out = t(*args)
    out = getattr(out, "logits", out)
    out.float().square().mean().backward()
    assert all(p.grad is not None for p in t.parameters())
    optimizer.step()
    return t.eval()


def compiled_as_trained(t, *args):
    """Checks what is compiled against t, and t against float; gives the paths of the trained modules."""
    with torch.no_grad():
        wanted = t(*args)
        wanted = getattr(wanted, "logits", wanted)
    q = qpass.compile(t, backend="reference")
    found = q(*args)
    assert relative(getattr(found, "logits", found), wanted) < 1e-5
    exact = float_model(t)(*args)
    assert relative(getattr(exact, "logits", exact), wanted) > 1e-3
    return sorted(trained_modules(t))


CONVOLUTIONS = {
    "reflect": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (2, 4, 7, 7)),
    "1d": (nn.Conv1d(4, 8, 3, padding="same"), (2, 4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed-grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "transposed-1d": (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 9)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    module, shape = CONVOLUTIONS[name]
    x = torch.randn(shape)
    t = moved(prepared(nn.Sequential(module, nn.ReLU()), "w4a4", x), x)
    assert compiled_as_trained(t, x) == ["0"]


def test_gpt2():
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    ids = torch.randint(50, (2, 7))
    t = moved(prepared(tf.GPT2LMHeadModel(config), "w4a4", (ids,)), ids)
    paths = compiled_as_trained(t, ids)
    assert [p for p in paths if ".h." in p] == [
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_a_table_and_the_head_that_is_tied_to_it():
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    ids = torch.randint(50, (2, 7))
    recipe = {"transformer.wte": "w4a16-g8", "lm_head": "w4a16-g8", "*": None}
    t = prepared(tf.GPT2LMHeadModel(config), "w4a16-g8", (ids,), recipe=recipe)
    with torch.autocast("cpu", torch.bfloat16):  # a table is no product: it stays in float32, as without quantizers
        assert t.transformer.wte(ids).dtype == torch.float32
        assert t(ids).logits.dtype == torch.bfloat16
    t = moved(t, ids)
    assert t.lm_head.weight is t.transformer.wte.weight
    assert t.lm_head.used[0] is t.transformer.wte.used[0]
    assert compiled_as_trained(t, ids) == ["lm_head", "transformer.wte"]


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("whole", [False, True])
def test_torch_encoder_layers_leave_their_fast_path(whole, monkeypatch):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 2) if whole else layer
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    batch = dict(src=x, src_key_padding_mask=mask)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    t = prepared(model, "w4a4", batch).eval()
    sites = quantized_calls(monkeypatch)
    with torch.no_grad():
        quiet = t(**batch)
    assert len(sites) == 8 * (2 if whole else 1)
    assert torch.equal(t(**batch), quiet)  # with gradients torch does not take it either
    q = qpass.compile(t, backend="reference")
    assert relative(q(**batch)[~mask], quiet[~mask]) < 1e-5
    back = float_model(t)
    for name, module in back.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert getattr(module, "activation_relu_or_gelu", 1) == 1
        assert getattr(module, "use_nested_tensor", True)
    switch(t, False)
    with torch.no_grad():
        torch.testing.assert_close(t(**batch)[~mask], back(**batch)[~mask], rtol=1e-4, atol=1e-5)


def test_own_forward_by_keyword_and_positional():
    t = prepared(Gated(), "w4a4", torch.randn(2, 3, 16)).eval()
    x = torch.randn(2, 3, 16)
    assert torch.equal(t.gate(input=x), t.gate(x))
    weight, value = t.gate.used[0](t.gate.weight), t.gate.used[1](x)
    torch.testing.assert_close(t.gate(x), F.linear(value, weight, t.gate.bias), rtol=1e-4, atol=1e-5)


class Cosine(nn.Linear):
    """A linear of what it makes of its input."""

    def forward(self, x):
        return super().forward(F.normalize(x, dim=-1))


class Product(nn.Linear):
    """A linear of its input, with a forward of its own."""

    def forward(self, x):
        rows = x.reshape(-1, self.in_features)
        return (rows @ self.weight.T + self.bias).view(*x.shape[:-1], -1)


class Two(nn.Module):
    """A module with parameters of its own in the middle of others, and with two of them."""

    def __init__(self):
        super().__init__()
        self.inner, self.cosine, self.product = nn.Linear(16, 16), Cosine(16, 16), Product(16, 16)
        self.one, self.two = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2))

    def forward(self, x):
        h = self.product(torch.relu(self.cosine(self.inner(x))))
        return F.linear(torch.relu(F.linear(h, self.one)), self.two)


def test_modules_that_multiply_something_else_than_their_argument():
    x = torch.randn(2, 3, 16)
    for scheme, weights in (("w4a4", ["inner", "product"]), ("w4a4-dynamic", ["inner", "product"])):
        t = moved(prepared(Two(), scheme, x), x)
        assert compiled_as_trained(t, x) == weights
        why = {d.site: d.why for d in training_of(t).plan}
        assert "first argument" in why["cosine:linear.0"]
        assert "first argument" in why[":linear.0"]
    t = moved(prepared(Two(), "w4a16-g8", x), x)  # weights alone: of two in one module, one
    assert "fake-quantized already" in {d.site: d.why for d in training_of(t).plan}[":linear.1"]
    assert compiled_as_trained(t, x) == ["", "cosine", "inner", "product"]
