"""The distillation loss: its formula, what it takes, and that the teacher is left as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from qpass.qat import distillation_loss


def test_formula():
    mine, theirs = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7)
    p, q = (t.detach().double().div(2).softmax(-1) for t in (theirs, mine))
    wanted = 4 * (p * (p / q).log()).sum(-1).mean()
    found = distillation_loss(mine, theirs, temperature=2.0)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=1e-7)
    assert float(distillation_loss(theirs, theirs)) == pytest.approx(0, abs=1e-6)
    found.backward()
    assert mine.grad.abs().sum() > 0


def test_in_one_line_with_a_teacher_in_training_mode():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    x = torch.randn(6, 16)
    t = qpass.prepare_qat(model, "w4a8", x)
    loss = distillation_loss(t.eval()(x), model, x)
    assert model.training
    assert model[1].training
    assert float(loss) == float(distillation_loss(t(x), model.eval()(x)))
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_outputs_with_logits_and_what_has_none():
    logits = torch.randn(2, 4)
    assert float(distillation_loss(SimpleNamespace(logits=logits), logits)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(QpassError, match=r"student gives logits \(2, 4\), the teacher \(2, 5\)"):
        distillation_loss(logits, torch.randn(2, 5))
    with pytest.raises(QpassError, match="the student's output, a dict, is no tensor and has no logits"):
        distillation_loss({}, logits)
