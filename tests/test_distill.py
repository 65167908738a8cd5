"""The distillation loss: its formula, what it takes, and that the teacher is left as it was."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import qpass
from qpass.errors import QpassError
from qpass.qat import Distillation, distillation_loss


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


class Layers(nn.Module):
    """Two layers in a list; the second gives a tuple."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


class Layer(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.i, self.fc = i, nn.Linear(16, 16)

    def forward(self, x):
        y = torch.relu(self.fc(x)) + x
        return (y, None) if self.i else y


def test_features_add_the_relative_distance_of_each_layer():
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(6, 16)
    t = qpass.prepare_qat(model, "w3a3", x)
    distillation = Distillation(t, model, weight=3.0)
    assert distillation.paths == ["layers.0", "layers.1"]
    answers = t(x)
    loss = distillation(answers, x)
    with torch.no_grad():
        mine, theirs = t.layers[0](x), model.layers[0](x)
        deep = [m.layers[1](first)[0] for m, first in ((t, mine), (model, theirs))]
        parts = [(a - b).square().sum() / b.square().sum() for a, b in ((mine, theirs), deep)]
    wanted = distillation_loss(answers, model(x)) + 3.0 * (parts[0] + parts[1]) / 2
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert t.layers[0].fc.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    assert distillation.given == {}
    named = Distillation(t, model, features="layers.1.fc")
    assert float(named(t(x), x)) > float(distillation_loss(t(x), model, x))
    distillation.close()
    named.close()
    assert not t.layers[0]._forward_hooks
    assert not model.layers[0]._forward_hooks


def test_copies_and_compiled_models_know_nothing_of_it():
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(6, 16)
    t = qpass.prepare_qat(model, "w4a8", x)
    distillation = Distillation(t, model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(t)))
    twin(x).sum().backward()
    q = qpass.compile(t.eval(), backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(q(x), t(x), rtol=1e-5, atol=1e-5)
    assert distillation.given == {}


def test_checkpointing_keeps_nothing_behind():
    model, x = Layers(), torch.randn(6, 16)
    t = qpass.prepare_qat(model, "w4a8", x)
    distillation = Distillation(t, model)
    y = torch.utils.checkpoint.checkpoint(t, x.requires_grad_(), use_reentrant=False)
    distillation(y, x.detach()).backward()
    assert distillation.given == {}


def test_what_is_wrong_is_named():
    model, x = Layers(), torch.randn(6, 16)
    t = qpass.prepare_qat(model, "w4a8", x)
    with pytest.raises(QpassError, match=r"no module of this Layers matches 'blocks\.\*'"):
        Distillation(t, model, features="blocks.*")
    with pytest.raises(QpassError, match="no module of this Sequential matches a list of modules of one class"):
        Distillation(qpass.prepare_qat(nn.Sequential(nn.Linear(16, 16)), "w4a8", x), nn.Linear(16, 16))
    with pytest.raises(QpassError, match=r"the teacher, a Linear, has no module 'layers\.0'"):
        Distillation(t, nn.Linear(16, 4))
    distillation = Distillation(t, model)
    with pytest.raises(QpassError, match=r"layers\.0 gives None in the student and \(6, 16\) in the teacher"):
        distillation(torch.randn(6, 4), x)


class Experts(nn.Module):
    """Layers that hold lists of their own, of which a call reads one, and give a mapping."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(16, 16)])}) for _ in range(2))
        self.named, self.silent = Named(), Silent()

    def forward(self, x):
        self.silent(x)
        for layer in self.layers:
            x = layer["experts"][0](x)
        return self.named(x)["hidden"]


class Named(nn.Module):
    def forward(self, x):
        return {"hidden": torch.tanh(x)}


class Silent(nn.Module):
    def forward(self, x):
        return None


def test_lists_within_layers_mappings_and_modules_that_give_nothing():
    model, x = Experts(), torch.randn(6, 16)
    t = qpass.prepare_qat(model, "w4a8", x)
    assert Distillation(t, model, features=None).paths == ["layers.0", "layers.1"]
    named = Distillation(t, model, features="named")
    assert torch.isfinite(named(t(x), x))
    with pytest.raises(QpassError, match="silent gives None in the student and None in the teacher"):
        Distillation(t, model, features="silent")(t(x), x)
