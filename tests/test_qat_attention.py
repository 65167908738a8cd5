"""nn.MultiheadAttention in training: torch's own results, its products fake-quantized, and lowered as they were trained."""

import copy
import io

import pytest
import torch
from torch import nn

import qpass
from qpass.qat import float_model, switch
from qpass.qat.attention import Attention, split, whole
from tests.models import relative
from tests.models_training import grads, prepared

E, HEADS, N, L, S = 16, 4, 3, 5, 7
MADE = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other sizes": {"kdim": 6, "vdim": 10, "batch_first": True},
    "dropout": {"dropout": 0.4},
}
EVERY = torch.zeros(L, S, dtype=torch.bool).index_fill_(1, torch.tensor([2]), True)
CALLS = {
    "self": {},
    "two": {},
    "three": {},
    "one sample": {},
    "no weights": {"need_weights": False},
    "all heads": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.arange(S).expand(N, S) >= torch.tensor([[7], [5], [1]])},
    "booleans": {"attn_mask": EVERY, "need_weights": False},
    "numbers": {"attn_mask": torch.randn(N * HEADS, L, S)},
    "both": {"attn_mask": EVERY, "key_padding_mask": torch.arange(S).expand(N, S) > 5, "need_weights": False},
    "causal": {"attn_mask": torch.ones(S, S).triu(1).bool(), "is_causal": True, "need_weights": False},
    "causal, weights": {"attn_mask": torch.ones(S, S).triu(1).bool(), "is_causal": True},
}


def operands(module, call):
    """Query, key, value as a call has them."""
    of_one = call in ("self", "padding") or call.startswith("causal")
    shapes = [(S if of_one else L, E), (S, module.kdim), (S, module.vdim)]
    first, second, third = (torch.randn(length, N, size) for length, size in shapes)
    same = module.kdim == module.vdim == E
    if same and of_one:
        second = third = first
    elif same and call == "two":
        third = second
    found = [first, second, third]
    if call == "one sample":
        return [x[:, 0] for x in found]
    if not module.batch_first:
        return found
    made = {id(x): x.transpose(0, 1) for x in found}
    return [made[id(x)] for x in found]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("made", MADE)
def test_it_is_torchs_own(made, call, training):
    module = nn.MultiheadAttention(E, HEADS, **MADE[made]).train(training)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
    x = [v.requires_grad_() for v in operands(module, call)]

    def run():
        torch.manual_seed(1)
        module.zero_grad()
        y, weights = module(*x, **CALLS[call])
        y.square().sum().backward()
        return y, weights, grads(module)

    y, weights, found = run()
    split(module)
    assert type(module) is Attention
    ours, our_weights, our_found = run()
    torch.testing.assert_close(ours, y)
    assert (weights is None) == (our_weights is None)
    if weights is not None:
        torch.testing.assert_close(our_weights, weights)
    for name, grad in found.items():
        torch.testing.assert_close(our_found[name], grad)
    whole(module)
    assert type(module) is nn.MultiheadAttention


def test_a_hint_without_a_mask_is_an_error_as_in_torch():
    module = nn.MultiheadAttention(E, HEADS)
    x = torch.randn(S, N, E)
    for each in (lambda m: None, split):
        each(module)
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(x, x, x, is_causal=True)


def encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


X = torch.randn(6, 9, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a4-dynamic", "w2a16-g32", "w8a8,smooth=none"])
def test_every_product_is_trained_and_lowers_to_what_was_trained(scheme, norm_first):
    x = X.double()  # in which sums put no code on the other side of an edge
    t = prepared(encoder(norm_first).double(), scheme, x)
    sites = [d for d in qpass.analyze(t.eval()) if d.operation == "linear"]
    assert len(sites) == 8
    assert all(d.quantized for d in sites)
    optimizer = torch.optim.AdamW(qpass.qat.param_groups(t, lr=1e-2))
    t.train()
    for _ in range(3):
        t(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in t.parameters())
        optimizer.step()
        optimizer.zero_grad()
    q = qpass.compile(t.eval(), backend="reference")
    assert isinstance(t.layers[0].self_attn, Attention)
    assert not any(isinstance(m, Attention) for m in q.modules())
    with torch.no_grad():
        assert relative(q(x), t(x)) < 1e-5
        assert relative(q(x[:2, :4]), t(x[:2, :4])) < 1e-5


def test_without_rounding_it_trains_as_the_float_model():
    model = encoder().train()
    t = prepared(copy.deepcopy(model), "w4a8", X)
    switch(t, False)
    t.train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(dict(t.named_parameters())[name])  # it begins with weights next to the codes
    losses = []
    for each in (model, t):
        torch.manual_seed(2)
        optimizer, seen = torch.optim.SGD(each.parameters(), lr=0.1), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (each(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_two_sequences_at_a_decoder():
    """Keys and values of another sequence read a part of a matrix, which stays in float; the product behind is trained."""
    layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).double()
    example = (X.double(), X[:, :5].double())
    t = qpass.prepare_qat(layer.eval(), "w8a8", example, [example])
    plan = qpass.analyze(t.eval())
    assert {d.site for d in plan if d.operation == "linear" and not d.quantized} == {
        "multihead_attn:linear.0",
        "multihead_attn:linear.1",
    }
    assert plan.decisions["multihead_attn:linear.2"].quantized
    q = qpass.compile(t.eval(), backend="reference")
    with torch.no_grad():
        assert relative(q(*example), t(*example)) < 1e-5


class Both(nn.Module):
    """One attention over a sequence and over two: the input of its matrix is a site of its own in the first call alone."""

    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 3)

    def forward(self, x, y):
        one, _ = self.attention(query=x, key=x, value=x, need_weights=False)
        two, _ = self.attention(one, y, y)
        return self.last(two)


def test_one_module_called_in_both_ways():
    example = (X.double(), X[:, :5].double())
    t = prepared(Both().double(), "w4a8", example).eval()
    plan = qpass.analyze(t)
    assert {d.site for d in plan if d.operation == "linear" and not d.quantized} == {
        "attention:linear.2",
        "attention:linear.3",
    }
    q = qpass.compile(t, backend="reference")
    with torch.no_grad():
        assert relative(q(*example), t(*example)) < 1e-5


def test_copies_checkpoints_and_the_float_model():
    t = prepared(encoder(), "w4a8", X).eval()
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    for other in (copy.deepcopy(t), torch.load(file, weights_only=False)):
        assert isinstance(other.layers[1].self_attn, nn.MultiheadAttention)
        assert torch.equal(other(X), t(X))
    names = encoder().state_dict().keys()
    assert names <= t.state_dict().keys()
    back = float_model(t)
    assert back.state_dict().keys() == names
    assert all(type(m) is nn.MultiheadAttention for m in back.modules() if isinstance(m, nn.MultiheadAttention))
    with torch.no_grad():
        switch(t, False)
        torch.testing.assert_close(back(X), t(X))


class Own(nn.MultiheadAttention):
    """A class of a user's."""

    def forward(self, query, key, value, **options):
        return super().forward(2 * query, key, value, **options)


def test_a_class_of_a_users_stays_float_and_says_so():
    model = encoder()
    for layer in model.layers:
        layer.self_attn.__class__ = Own
    t = prepared(model, "w8a8", X)
    left = [d for d in qpass.analyze(t.eval()) if "self_attn:linear" in d.site]
    assert left
    assert all(not d.quantized and d.why for d in left)
    assert type(t.layers[0].self_attn) is Own
