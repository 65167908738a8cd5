"""Ordinary training loops on a prepared model: with quantizers off it is the float model; on, nothing of the loop changes."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qpass
from qpass.qat import float_model, param_groups, switch
from qpass.qat.quantizer import Quantizer
from tests.models_training import Gated, Images, grads, loss_of, prepared

X = torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(3))


def images(count=6):
    return torch.randn(count, 3, 7, 7)


def trained_with_seed(model, optimizer, batch, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("scheme", ["w4a4", "w2a8-dynamic"])
def test_float_twin_step_for_step(scheme):
    model = Images()
    called = []
    model.first.register_forward_hook(lambda m, args, out: called.append("before"))
    model.head.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    t = prepared(model, scheme, images())
    switch(t, False)
    t.second.register_forward_hook(lambda m, args, out: called.append("after"))
    twin = float_model(t)
    assert type(t) is type(twin) is Images
    assert type(twin.first) is nn.Conv2d
    assert isinstance(t.first, nn.Conv2d)
    assert isinstance(t.head, nn.Linear)
    one, two = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (t, twin))
    for step in range(4):
        batch = images()
        called.clear()
        assert torch.equal(trained_with_seed(t, one, batch, step), trained_with_seed(twin, two, batch, step))
        assert called == ["before", "after"] * 2
        with torch.no_grad():
            assert torch.equal(t.eval()(batch), twin.eval()(batch))
        t.train(), twin.train()
    theirs = t.state_dict()
    for name, value in twin.state_dict().items():
        assert torch.equal(theirs[name], value), name
    assert float(t.seen) == 24
    assert int(t.norm.num_batches_tracked) == 4


def test_switch_says_what_it_needs():
    with pytest.raises(qpass.QpassError, match="prepare_qat"):
        switch(nn.Linear(2, 2), True)
    t = prepared(Gated(), "w4a4", X).eval()
    rounded = t(X)
    switch(t, False)
    assert torch.equal(t(X), float_model(t)(X))
    switch(t, True)
    assert torch.equal(t(X), rounded)
    assert not torch.equal(rounded, float_model(t)(X))


def test_optimizer_and_scheduler_move_weights_and_steps():
    t = prepared(Gated(), "w4a4", X)
    before = {n: p.detach().clone() for n, p in t.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(t, lr=1e-2, weight_decay=0.1, step_lr=1e-3))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 1e-2, 1e-3], total_steps=20)
    losses = []
    for _ in range(20):
        losses.append(float(trained_with_seed(t, optimizer, X, 0)))
        scheduler.step()
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in t.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("scheme", ["w3a16-g8", "w4a4"])
def test_gradients_of_two_halves_are_those_of_the_whole(scheme):
    t = prepared(Gated(), scheme, X)
    t.drop.p = 0.0
    loss_of(t, X).backward()
    whole = grads(t)
    t.zero_grad()
    for half in X.chunk(2):
        (loss_of(t, half) / 2).backward()
    for name, grad in grads(t).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scheme", ["w4a4,smooth=none", "w4a4-dynamic,smooth=none", "w4a16-g8"])
def test_bf16_autocast(scheme):
    t = prepared(Gated(), scheme, X)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(t, X)
        found = t.gate(X)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in t.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
    weight, x = (q if q is None else q.to(torch.float32) for q in t.gate.used)
    x = X if x is None else x(X)
    as_bf16 = [v.bfloat16() for v in (x, weight(t.gate.weight), t.gate.bias)]
    assert torch.equal(found, F.linear(*as_bf16))


@pytest.mark.parametrize("method", ["lsq+", "ste"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant, method):
    # the block reads its argument itself, so that what is run again reads the very same tensor
    t = prepared(Gated(), "w4a4", X, method=method)
    t.norm = nn.Identity()
    x = X.clone().requires_grad_()
    twin = copy.deepcopy(t)
    torch.manual_seed(1)
    loss_of(twin, x).backward()
    wanted, to_x = grads(twin), x.grad.clone()
    x.grad = None
    torch.manual_seed(1)
    loss_of(lambda value: checkpoint(t, value, use_reentrant=reentrant), x).backward()
    found = grads(t)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(x.grad, to_x)
    assert all(torch.equal(a, b) for a, b in zip(t.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-dynamic"])
def test_torch_compile_gives_the_same_loss_and_gradients(scheme):
    model = nn.Sequential(Gated(), nn.Flatten(), nn.Unflatten(1, (16, 6)), nn.ConvTranspose1d(16, 4, 3))
    t = prepared(model, scheme, X)
    t[0].drop.p = 0.0
    loss = loss_of(t, X)
    loss.backward()
    wanted = grads(t)
    t.zero_grad()
    again = loss_of(torch.compile(t, backend="aot_eager", fullgraph=True), X)
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, grad in grads(t).items():
        torch.testing.assert_close(grad, wanted.pop(name), rtol=1e-4, atol=1e-7)
    assert not wanted


@pytest.mark.parametrize("method", ["lsq+", "ste"])
def test_copies_files_and_state(method):
    t = prepared(Images(), "w3a5", images(), method=method)
    optimizer = torch.optim.SGD(t.parameters(), lr=0.05)
    trained_with_seed(t, optimizer, images(), 0)
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    others = [copy.deepcopy(t), torch.load(file, weights_only=False)]
    file = io.BytesIO()
    torch.save(t.state_dict(), file)
    file.seek(0)
    others.append(prepared(Images(), "w3a5", images(), method=method))
    assert others[-1].load_state_dict(torch.load(file, weights_only=True)) == ([], [])
    x = images()
    wanted = t.eval()(x)
    for other in others:
        assert torch.equal(other.eval()(x), wanted)
        assert type(other.first) is type(t.first)
        lowered = qpass.compile(other, backend="reference")
        torch.testing.assert_close(lowered(x), wanted, rtol=1e-4, atol=1e-5)
    assert not {id(p) for p in t.parameters()} & {id(p) for p in others[0].parameters()}


def test_steps_stay_float32_in_a_bfloat16_model():
    t = prepared(Gated(), "w4a4", X)
    before = [p.clone() for q in t.modules() if isinstance(q, Quantizer) for p in q.parameters()]
    t.bfloat16()
    after = [p for q in t.modules() if isinstance(q, Quantizer) for p in q.parameters()]
    assert t.gate.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    loss_of(t, X.bfloat16()).backward()
    assert all(p.grad.dtype == p.dtype for p in t.parameters())
