"""What qpass.search cannot do, said before or where it happens."""

import sys

import pytest
import torch
from torch import nn

import qpass
from tests.models import TwoGraphs, batches


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval(), batches(2, (8, 16))


def search(net, budget="9 bits", **options):
    options = {"candidates": ("w4a16-c", "w8a8"), "calibration": net[1], **options}
    return qpass.search(net[0], budget, **options)


def test_a_budget_that_cannot_be_met_says_the_smallest(net):
    with pytest.raises(qpass.QpassError, match=r"100 bytes cannot be met.*least is ([\d,]+) bytes") as error:
        search(net, 100)
    smallest = int(str(error.value).partition("least is ")[2].partition(" bytes")[0].replace(",", ""))
    assert search(net, smallest).cost == smallest
    with pytest.raises(qpass.QpassError, match="cannot be met"):
        search(net, smallest - 1)


def test_bits_that_cannot_be_met(net):
    with pytest.raises(
        qpass.QpassError, match=r"2 bits a weight cannot be met; with candidates w4a16-c, w8a8 the least"
    ):
        search(net, "2 bits")


def drawn(model):
    return float(torch.randn(()))


def drawn_of_outputs(output, wanted):
    return float(torch.randn(()))


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda model: float("nan"), "metric <lambda>, of the float model: it returned nan"),
        (lambda a, b: float("nan"), "it returned nan"),
        (lambda model: 1 / 0, "of the float model: it raised ZeroDivisionError"),
        (lambda a, b: 1 / 0, "it raised ZeroDivisionError"),
        (lambda model: "good", "it returned a str; expected one number"),
        (drawn, "metric drawn is not deterministic: evaluated twice on the float model"),
        (drawn_of_outputs, "metric drawn_of_outputs is not deterministic"),
        (lambda model: 1.0, "did not call the model"),
        ("klm", "Did you mean 'kl'"),
        (3, "metric=3 is none of"),
    ],
)
def test_metrics_that_are_none(net, metric, says):
    with pytest.raises(qpass.QpassError, match=says):
        search(net, metric=metric)


def test_a_metric_that_fails_on_the_way_says_where(net):
    wanted = net[0](net[1][0]).detach()

    def late(model):
        return 0.0 if torch.equal(model(net[1][0]), wanted) else float("inf")

    with pytest.raises(
        qpass.QpassError, match=r"metric late, of the model with w4a16-c of 0:linear\.0: it returned inf"
    ):
        search(net, metric=late)


def test_a_model_that_is_not_deterministic(net):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 8)

        def forward(self, x):
            return self.inner(x) + torch.randn(8)

    with pytest.raises(qpass.QpassError, match="not deterministic"):
        search((Noisy().eval(), net[1]))


def test_candidates_that_no_site_can_take():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), batches(2, (2, 3, 6, 6))
    with pytest.raises(qpass.QpassError, match=r"no site of this 1 can take fp8.*convolutions become integers"):
        qpass.search(model, "9 bits", candidates=("w8a8", "fp8"), calibration=data)


@pytest.mark.parametrize(
    ("candidates", "says"),
    [
        ((), "has no scheme"),
        ((None,), "has no scheme"),
        ("w4a16", "expected a list of schemes"),
        (("w4a16", "w9a9"), "weights have 2 to 8 bits"),
        (7, "expected a list"),
    ],
)
def test_candidates_that_are_none(net, candidates, says):
    with pytest.raises(qpass.QpassError, match=says):
        search(net, candidates=candidates)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"calibration": None}, "w8a8 has static input scales and needs calibration"),
        ({"calibration": []}, "calibration gave no batches"),
        ({"calibration": torch.zeros(2)}, "calibration is a Tensor"),
        ({"validation": []}, "validation gave no batches"),
        ({"calibration": None, "candidates": ("w4a16-c",)}, "search measures losses on batches"),
        ({"estimate": "third order"}, "Did you mean 'second order'"),
        ({"rounds": 0}, "rounds=0; expected a whole number"),
        ({"recipe": {"nothing": None}}, "'nothing' matches no module"),
        ({"metric": lambda a, b: 0.0, "estimate": "second order"}, "not of a function"),
    ],
)
def test_other_arguments(net, options, says):
    with pytest.raises(qpass.QpassError, match=says):
        search(net, **options)


def test_without_scipy(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(qpass.QpassError, match=r"pip install 'qpass-torch\[search\]'"):
        search(net)


def test_several_graphs():
    """Measured runs whole calls; gradients do not reach across, which is said."""
    torch.manual_seed(0)
    model, data = TwoGraphs().eval(), batches(2, (4, 8))
    found = qpass.search(model, "9 bits", candidates=("w4a16-c", "w8a16"), calibration=data)
    assert [g.name for g in found.groups] == ["a:linear.0", "b:linear.0"]
    assert list(found.losses) == ["measured"]
    assert any("several graphs" in note for note in found.notes)
    with pytest.raises(qpass.QpassError, match="several graphs"):
        qpass.search(model, "9 bits", candidates=("w4a16-c",), calibration=data, estimate="second order")
