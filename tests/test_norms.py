"""Batch norms of a training: frozen, and estimated anew with the weights as they are."""

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from qpass.qat import freeze_norms, reestimate_norms


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 4)
    )


def test_statistics_are_those_of_the_batches():
    batches = [torch.randn(16, 3, 6, 6) + 1 for _ in range(4)]
    t = qpass.prepare_qat(net(), "w4a4", batches[0]).train()
    modes = [m.training for m in t.modules()]
    assert reestimate_norms(t, batches) == 4
    assert [m.training for m in t.modules()] == modes
    t.eval()
    with torch.no_grad():
        made = [t[0](x) for x in batches]
    torch.testing.assert_close(t[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in made]).mean(0))
    torch.testing.assert_close(t[1].running_var, torch.stack([y.var((0, 2, 3)) for y in made]).mean(0))
    assert t[1].momentum == 0.1


def test_nothing_to_estimate_or_to_estimate_from():
    with pytest.raises(QpassError, match="has no batch norm"):
        reestimate_norms(nn.Linear(4, 4), [torch.randn(2, 4)])
    model = net()
    model[1].running_mean.fill_(3)
    with pytest.raises(QpassError, match="got no batches"):
        reestimate_norms(model, [])
    assert bool((model[1].running_mean == 3).all())
    with pytest.raises(RuntimeError, match="channels"):
        reestimate_norms(model, [torch.randn(2, 4, 6, 6)])
    assert bool((model[1].running_mean == 3).all())


def test_frozen_norms_stay():
    model = net().train()
    assert freeze_norms(model) == 1
    before = model[1].running_mean.clone()
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert torch.equal(model[1].running_mean, before)
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None
