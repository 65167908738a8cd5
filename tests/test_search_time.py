"""Budgets in milliseconds: sums of times of single linears, and the rest of a call as it runs compiled."""

import pytest
import torch
from torch import nn

import qpass
from qpass import profit
from qpass.search import cost
from tests.models import batches


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval(), batches(2, (16, 64))


@pytest.fixture
def known(monkeypatch):
    """Times that a test can reckon with: microseconds by bits; the rest of the call takes 1 ms."""

    def timing(d, backend):
        return profit.Timing(4000.0, {4: 1000.0, 8: 2000.0}[d.weight_type.bits])

    monkeypatch.setattr(profit, "timing", timing)
    monkeypatch.setattr(cost, "milliseconds", lambda model, plan, example: 3.0)


def search(net, budget, **options):
    model, data = net
    return qpass.search(model, budget, candidates=("w4a16-c", "w8a16-c", None), calibration=data, **options)


@pytest.mark.parametrize(("budget", "sums"), [("3 ms", 2), ("4.5 ms", 3), ("5 ms", 4), ("8.9 ms", 6), ("1 s", 8)])
def test_times_add_up(net, known, budget, sums):
    """Two linears of 1, 2 or 4 ms, and 1 ms for all else: 3 ms with both at 4 bits."""
    found = search(net, budget)
    assert found.tables["ms"].rest == pytest.approx(1.0)
    assert found.cost <= found.budget.limit * (1 + 1e-9)
    assert found.cost == pytest.approx(1 + sums)
    assert found.milliseconds == 3.0
    assert set(found.fronts) == {"bytes", "bits", "ms"}
    assert found.front[0].cost == pytest.approx(3)
    assert found.plan.front["unit"] == "ms"


def test_too_little_time(net, known):
    with pytest.raises(
        qpass.QpassError, match=r"2.5 ms cannot be met.*least is 3 ms, 1 of it for what is not chosen for"
    ):
        search(net, "2.5 ms")


def test_convolutions_have_no_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 8)).eval()
    with pytest.raises(qpass.QpassError, match=r"\(conv2d\) is none: leave it out by recipe="):
        qpass.search(model, "1 s", candidates=("w8a8", None), calibration=batches(2, (2, 3, 6, 6)))


def test_times_of_this_machine(net):
    found = search(net, "10 s")
    assert 0 < found.cost < 1000
    assert found.milliseconds > 0
    assert all(value >= 0 for value in found.tables["ms"].of.values())
