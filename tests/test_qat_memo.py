"""Modules that read one value: it is fake-quantized once in each pass, and nothing of it is kept after a step."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qpass.qat.memo import Memo
from tests.models import Attention
from tests.models_training import Gated, grads, loss_of, prepared, quantized_calls

X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(3))


def inputs(sites):
    return [site for site in sites if site.endswith(".input")]


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-dynamic"])
def test_three_readers_one_computation(scheme, monkeypatch):
    t = prepared(nn.Sequential(nn.LayerNorm(32), Attention()), scheme, X)
    assert t[1].q.used[1] is t[1].k.used[1] is t[1].v.used[1]
    assert t[1].q.used[1].readers == 3
    sites = quantized_calls(monkeypatch)
    for mode in (torch.enable_grad, torch.no_grad, torch.enable_grad):
        sites.clear()
        with mode():
            t(X)
        assert sorted(inputs(sites)) == ["1.out:linear.0.input", "1.q:linear.0.input"]
    sites.clear()
    with torch.inference_mode():  # where no version tells of a change in place
        t(X)
    assert len(inputs(sites)) == 4


def test_gradients_are_those_of_separate_computations():
    t = prepared(Attention(), "w4a4", X)
    x = X.clone().requires_grad_()
    loss_of(t, x).backward()
    once, to_x = grads(t), x.grad
    t.zero_grad()
    x.grad = None
    t.q.used[1].readers = 1
    loss_of(t, x).backward()
    torch.testing.assert_close(x.grad, to_x)
    for name, grad in grads(t).items():
        torch.testing.assert_close(grad, once[name], rtol=1e-4, atol=1e-7)


def test_two_passes_over_one_tensor_have_graphs_of_their_own(monkeypatch):
    t = prepared(Attention(), "w4a4", X)
    sites = quantized_calls(monkeypatch)
    one, two = loss_of(t, X), loss_of(t, X)
    assert len(inputs(sites)) == 4
    one.backward()
    two.backward()
    assert one == two
    with torch.no_grad():
        for p in t.parameters():
            p.mul_(1.1)
    assert loss_of(t, X) != two


def test_a_change_in_place_is_seen():
    memo, value, result = Memo(), torch.zeros(3), torch.ones(3)
    memo.put(value, value._version, 1, result)
    assert memo.get(value, value._version, 2, 3) is result
    assert memo.get(value, value._version, 2, 3) is None  # it had it
    value.add_(1)
    assert memo.get(value, value._version, 3, 3) is None
    assert memo.get(torch.zeros(3), value._version, 3, 3) is None


@pytest.mark.parametrize("through", ["plain", "checkpoint"])
def test_nothing_is_kept_after_a_step(through, monkeypatch):
    t = prepared(nn.Sequential(nn.LayerNorm(16), Gated()), "w4a4", torch.randn(4, 6, 16))
    t[1].norm = nn.Identity()
    seen = []
    plain = Memo.put

    def put(self, value, state, reader, result):
        seen.extend((weakref.ref(value), weakref.ref(result)))
        plain(self, value, state, reader, result)

    monkeypatch.setattr(Memo, "put", put)
    x = torch.randn(4, 6, 16)

    def run(value):
        if through == "checkpoint":
            return checkpoint(t[1], t[0](value), use_reentrant=False)
        return t(value)

    gc.disable()
    try:
        loss_of(run, x).backward()
        with torch.no_grad():
            t[1].up.forward = lambda value: value.new_zeros(4, 6, 32)  # a reader that does not come
            run(x)
        assert len(seen) == (4 if through == "plain" else 6)
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
