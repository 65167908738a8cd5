"""scheme="auto": the bound holds for what is returned, what was given up is said, and nothing that breaks it comes back."""

import pytest
import torch
from torch import nn

import qpass
from tests.models import batches, encoder, relative
from tests.untouched import untouched

CANDIDATES = ("w4a16-c", "w8a16", None)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return encoder(1), batches(2), batches(2)


def auto(net, max_loss, **options):
    model, data, fresh = net
    options = {"calibration": data, "validation": fresh, "backend": "reference", "candidates": CANDIDATES, **options}
    return qpass.compile(model, "auto", data[0], max_loss=max_loss, **options)


def loss(net, q):
    with torch.no_grad():
        power = sum(float(net[0](x).double().square().sum()) for x in net[2])
        return sum(float((q(x).double() - net[0](x).double()).square().sum()) for x in net[2]) / power


@pytest.mark.parametrize("bound", [3e-2, 1e-4, 1e-5])
def test_the_bound_holds(net, bound):
    with untouched(net[0]):
        q = auto(net, bound)
    assert loss(net, q) <= bound
    plan = qpass.inspect(q).plan
    assert any(f"of at most {bound:.4g} on the validation data" in note for note in plan.notes)
    assert plan.quantized
    assert plan.front["chosen"]["loss"] == pytest.approx(loss(net, q), rel=1e-3)


def test_a_looser_bound_is_a_smaller_model(net):
    sizes = [sum(d.packed.nbytes for d in qpass.inspect(auto(net, b)).plan.quantized) for b in (1e-2, 1e-5)]
    assert sizes[0] < sizes[1]


def test_what_breaks_the_bound_backs_off_site_by_site(net):
    """A metric that is worse than the sum of its parts: two sites of 4 bits are one too many."""
    model, _, fresh = net

    def jump(q):
        if q is model:
            return 0.0
        few = sum(d.weight_type is not None and d.weight_type.bits == 4 for d in qpass.inspect(q).plan)
        return float(few > 1) + relative(q(fresh[0]), model(fresh[0]))

    q = auto(net, 0.9, metric=jump)
    plan = qpass.inspect(q).plan
    assert sum(d.weight_type.bits == 4 for d in plan.quantized) <= 1
    gave = [note for note in plan.notes if "gave up w4a16-c for" in note]
    assert gave
    assert all("the model lost 1" in note for note in gave)


def test_none_holds(net):
    says = (
        r"no quantized recipe keeps squared error within max_loss=1e-12\. The best of \d+ that were compiled and measured "
        r"loses \d.*sites quantized: w"
    )
    with pytest.raises(qpass.QpassError, match=says), untouched(net[0]):
        auto(net, 1e-12)


def test_a_function_of_the_model(net):
    model, _, fresh = net

    def apart(q):
        with torch.no_grad():
            return sum(relative(q(x), model(x)) for x in fresh)

    q = auto(net, 0.05, metric=apart)
    assert apart(q) <= 0.05


def test_in_place(net):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval(), batches(2, (8, 16))
    wanted = model(data[0]).detach()
    q = qpass.compile(
        model, "auto", data[0], data, max_loss=0.01, candidates=("w4a16-c", "w8a16"), backend="reference", inplace=True
    )
    assert q is model
    assert relative(q(data[0]), wanted) ** 2 <= 0.02


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_loss": None}, r"max_loss=None; scheme='auto' needs the most that the model may lose"),
        ({"max_loss": -1}, "max_loss=-1"),
        ({"max_loss": float("nan")}, "max_loss=nan"),
        ({"max_loss": 0.1, "guard": True}, "guard=True does not go with it"),
        ({"max_loss": 0.1, "metric": lambda q: float("nan")}, "of the float model: it returned nan"),
        ({"max_loss": 0.1, "metric": lambda q: float(torch.randn(()))}, "not deterministic"),
        ({"max_loss": 0.1, "candidates": ()}, "has no scheme"),
    ],
)
def test_bad_input(net, options, says):
    with pytest.raises(qpass.QpassError, match=says):
        auto(net, **options)


@pytest.mark.parametrize("name", ["max_loss", "metric", "validation", "candidates"])
def test_what_goes_with_auto_alone(net, name):
    with pytest.raises(qpass.QpassError, match=f"{name} goes with scheme='auto'"):
        qpass.compile(net[0], "w8a16", **{name: 1})
