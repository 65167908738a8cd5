"""Packing in place while deciding: the same model as a packed copy, float weights gone on the way, what is said if not."""

import gc
import weakref

import pytest
import torch
from torch import nn

import qpass
from qpass import decide as deciding
from tests.models import FeedForward
from tests.untouched import untouched


class Tied(nn.Module):
    """A table that the head shares, an image's convolution, and a block."""

    def __init__(self):
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(50, 32), FeedForward(), nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight
        self.conv = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x):
        y = self.block(self.table(x))
        return self.head(self.conv(y.transpose(1, 2)).transpose(1, 2))


def tied():
    torch.manual_seed(0)
    return Tied().eval()


@pytest.mark.parametrize("recipe", [None, {"block.up": None}, {"head": "w8a16", "table": "w8a16"}, {"conv": None}])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16", "w8a8-dynamic", "w4a16-g32,solver=hqq"])
def test_the_same_as_a_copy(scheme, recipe):
    model, x = tied(), torch.randint(0, 50, (2, 6))
    copied = qpass.compile(model, scheme, recipe=recipe, backend="reference")
    packed = qpass.compile(model, scheme, recipe=recipe, backend="reference", inplace=True)
    assert packed is model
    wanted, found = copied.state_dict(), packed.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert str(qpass.inspect(packed).plan) == str(qpass.inspect(copied).plan)
    assert (packed.head.weight is packed.table.weight) == (copied.head.weight is copied.table.weight)
    with torch.no_grad():
        assert torch.equal(packed(x), copied(x))


def deep():
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))).eval()


def test_float_weights_are_gone_before_the_next_group(monkeypatch):
    model = deep()
    floats = [weakref.ref(layer.weight) for layer in model]
    real, alive = deciding.decide_group, []

    def counted(*args):
        gc.collect()
        alive.append(sum(weight() is not None for weight in floats))
        return real(*args)

    monkeypatch.setattr(deciding, "decide_group", counted)
    qpass.compile(model, "w4a16-g32", inplace=True)
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_packed_in_part_says_so(monkeypatch, error):
    model, real, calls = deep(), deciding.decide_group, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(deciding, "decide_group", stopped)
    with pytest.raises(error) as found:
        qpass.compile(model, "w4a16-g32", inplace=True)
    assert "packed in part" in found.value.__notes__[0]
    with pytest.raises(qpass.QpassError, match="packed already"):
        qpass.compile(model, "w4a16-g32")


def test_before_the_first_group_nothing_has_changed(monkeypatch):
    model = deep()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with untouched(model), pytest.raises(qpass.QpassError, match="NaN"):
        qpass.compile(model, "w4a16-g32", inplace=True)
    model = deep()

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(deciding, "decide_group", stopped)
    with untouched(model), pytest.raises(KeyboardInterrupt) as found:
        qpass.compile(model, "w4a16-g32", inplace=True)
    assert not getattr(found.value, "__notes__", None)


def test_a_checkpoint_without_data_is_refused_in_place_too(tmp_path):
    for inplace in (False, True):
        model = deep()
        with untouched(model), pytest.raises(qpass.QpassError, match="checkpoint"):
            qpass.compile(model, "w4a16-g32", inplace=inplace, checkpoint=tmp_path / "kept")


def test_with_inputs_it_is_all_or_nothing(monkeypatch):
    """With data, or a guard that may change its mind, the model is packed at the end."""
    model, x = deep(), torch.randn(2, 32)
    seen = []
    monkeypatch.setattr(qpass.api, "told_if_in_part", lambda m: seen.append(m))
    qpass.compile(model, "w4a16-g32", x, inplace=True)
    qpass.compile(deep(), "w4a16-g32", calibration=[x], inplace=True)
    qpass.compile(deep(), inplace=True)
    assert not seen
