"""qpass.search on models of several kinds: a language model, tied weights, convolutions, a function of the model."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import qpass
from tests.models import FeedForward, batches, encoder
from tests.untouched import untouched

CANDIDATES = ("w2a16-c", "w4a16-c", "w8a8", None)


class Language(nn.Module):
    """A table, a block, a head that may be tied to the table; logits by name."""

    def __init__(self, tied=False):
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(24, 32), FeedForward(), nn.Linear(32, 24, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return {"logits": self.head(self.block(self.table(ids)))}


def test_kl_by_gradients_alone():
    torch.manual_seed(1)
    model, data = Language().eval(), [torch.randint(0, 24, (4, 7)) for _ in range(4)]
    both = qpass.search(model, "w4a16-c", candidates=CANDIDATES, calibration=data, tables=True)
    assert both.metric == "kl"
    assert both.rank >= 0.9
    assert {g.name.partition(":")[0] for g in both.groups} == {"table", "block.up", "block.down", "head"}
    with untouched(model):
        quick = qpass.search(
            model, "w4a16-c", candidates=CANDIDATES, calibration=data, tables=True, estimate="second order"
        )
    assert list(quick.losses) == ["second order"]
    assert quick.losses["second order"] == both.losses["second order"]
    assert quick.rank is None
    uniform = {"head": "w4a16-c", "table": "w4a16-c"}
    q = qpass.compile(model, "w4a16-c", data[0], data, uniform, backend="reference")
    loss = qpass.inspect(q, model, data, metric="kl").measured.loss
    assert both.loss < loss
    assert both.costs["bits"] <= both.budget.limit


def test_a_tied_weight_is_counted_once():
    torch.manual_seed(1)
    model, data = Language(tied=True).eval(), [torch.randint(0, 24, (4, 7)) for _ in range(2)]
    found = qpass.search(model, "8.5 bits", candidates=("w4a16-c", "w8a16", None), calibration=data, tables=True)
    (group,) = [g for g in found.groups if "head:linear.0" in g.sites]
    assert len(group.sites) == 2
    assert found.tables["bits"].unit == 24 * 32 + 2 * 32 * 96
    assert found.costs["bytes"] == sum(p.nbytes for p in model.parameters()) + sum(
        p.nbytes - 4 * p.data.numel() for p in found.plan.packed.values()
    )


def test_a_function_of_the_model():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), batches(2, (64, 16))
    labels = [model(x).argmax(-1) for x in data]

    def nats(net):
        with torch.no_grad():
            return sum(functional.cross_entropy(net(x), y) for x, y in zip(data, labels, strict=True))

    with untouched(model):
        found = qpass.search(model, 800, nats, ("w2a16-c", "w4a16-c", "w8a16"), calibration=data)
    assert list(found.losses) == ["measured"]
    q = qpass.compile(model, plan=found.plan, backend="reference")
    assert found.loss == pytest.approx(float(nats(q) - nats(model)), rel=1e-3, abs=1e-5)
    recipe = {"0": "w2a16-c,sequential=no", "2": None}
    q = qpass.compile(model, "w8a8", data[0], data, recipe, backend="reference")
    wanted = float(nats(q) - nats(model))
    assert found.losses["measured"]["0:linear.0", "w2a16-c"] == pytest.approx(wanted, rel=1e-3)


def test_no_choice_is_better_once_sites_act_together():
    """rounds=2 measures around the recipe: what it ends with is no worse, and its prediction is of the whole."""
    torch.manual_seed(0)
    model, data = encoder(1), batches(2)
    one, two = (
        qpass.search(model, "4 bits", candidates=("w2a16-c", "w3a16-c", "w8a16"), calibration=data, rounds=n)
        for n in (1, 2)
    )
    assert two.notes
    assert two.loss <= one.loss * 1.2


def test_a_budget_of_bytes_and_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10)
    ).eval()
    data = batches(2, (4, 3, 8, 8))
    found = qpass.search(model, "6 kB", candidates=("w4a8", "w8a8", None), calibration=data)
    assert found.cost <= 6000
    assert found.cost == sum(p.nbytes for p in model.parameters()) + sum(
        d.packed.nbytes - 4 * d.packed.data.numel() for d in found.plan.quantized
    )
    assert found.rank >= 0.8
