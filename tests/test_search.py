"""qpass.search: the recipe it finds keeps the budget, loses what is said, and cannot be bettered by any other choice."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import qpass
from qpass.search import candidates, measured
from tests.models import batches, encoder

CANDIDATES = ("w2a16-c", "w4a16-c", "w8a8", None)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model, data = encoder(1), batches(3)
    return model, data, qpass.search(model, "6 bits", candidates=CANDIDATES, calibration=data)


def test_the_budget_is_kept_and_used(net):
    model, _, found = net
    assert found.cost <= 6
    assert found.budget.kind == "bits"
    size = sum(p.nbytes for p in model.parameters())
    for d in found.plan.quantized:
        size += d.packed.nbytes - 4 * d.packed.data.numel()
    assert found.costs["bytes"] == size
    moves = [
        g for g in found.groups for c in g.takes
        if found.losses["measured"][g.name, c] < found.losses["measured"][g.name, found.chosen[g.name]]
        and found.tables["bits"].total({**found.chosen, g.name: c}) <= 6
    ]  # fmt: skip
    assert not moves


def test_sites_that_share_an_input_stay_together(net):
    found = net[2]
    (group,) = [g for g in found.groups if g.name == "0.q:linear.0"]
    assert group.sites == ("0.q:linear.0", "0.k:linear.0", "0.v:linear.0")
    assert len({str(found.plan[site].weight_type) for site in group.sites}) == 1


def test_the_loss_is_that_of_the_compiled_recipe(net):
    model, data, found = net
    q = qpass.compile(model, recipe=found.recipe, example_inputs=data[0], calibration=data, backend="reference")
    with torch.no_grad():
        noise = sum(float((q(x).double() - model(x).double()).square().sum()) for x in data)
        power = sum(float(model(x).double().square().sum()) for x in data)
    assert found.loss == pytest.approx(noise / power, rel=0.05)
    assert found.metric == "squared error"
    assert [d.weight_type for d in qpass.inspect(q).plan] == [d.weight_type for d in found.plan]


def test_losses_of_groups_are_those_of_models_with_such_groups(net):
    model, data, found = net
    recipe = {"1.up": "w2a16-c,sequential=no", "*": None}
    q = qpass.compile(model, "w8a8", data[0], data, recipe, backend="reference")
    loss = qpass.inspect(q, model, data, metric="squared error").measured.loss
    assert found.losses["measured"]["1.up:linear.0", "w2a16-c"] == pytest.approx(loss, rel=1e-3)


def test_second_order_tells_what_is_measured(net):
    found = net[2]
    assert found.rank >= 0.9
    for key, value in found.losses["measured"].items():
        if value > 1e-5:
            assert found.losses["second order"][key] == pytest.approx(value, rel=0.6)


def test_what_is_printed_and_drawn(net, tmp_path):
    found = net[2]
    text = str(found)
    assert "0.q:linear.0" in text
    assert "and 2 more" in text
    assert "of 6 bits a weight" in text
    assert "Spearman" in text
    found.plot(tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
    assert found.front == found.fronts["bits"]
    assert len(found.front) > 4


def test_a_recipe_is_kept(net):
    model, data, _ = net
    found = qpass.search(
        model, "6 bits", candidates=CANDIDATES, calibration=data, recipe={"1.down": "w8a16", "0.out": None}
    )
    assert {g.name for g in found.groups} == {"0.q:linear.0", "1.up:linear.0"}
    assert str(found.plan["1.down:linear.0"].weight_type) == "i8/c0"
    assert found.plan["1.down:linear.0"].input_type is None
    assert not found.plan["0.out:linear.0"].quantized


def test_an_interrupted_search_goes_on(net, tmp_path, monkeypatch):
    model, data, whole = net
    real, seen = measured.Measurement._batch, []

    def stopped(self, *args):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(args[-1])
        real(self, *args)

    monkeypatch.setattr(measured.Measurement, "_batch", stopped)
    call = dict(candidates=CANDIDATES, calibration=data, checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        qpass.search(model, "6 bits", **call)
    (folder,) = tmp_path.glob("search-*")
    assert json.loads(next(folder.glob("losses-*.json")).read_text())["batches"] == 1
    assert len(list(folder.glob("*.plan"))) == 3

    def counted(self, *args):
        seen.append(args[-1])
        real(self, *args)

    monkeypatch.setattr(measured.Measurement, "_batch", counted)
    monkeypatch.setattr(candidates, "decide", None)  # no plan is made again
    found = qpass.search(model, "6 bits", **call)
    assert seen[:3] == ["batch 0", "batch 1", "batch 2"]
    assert found.losses["measured"] == whole.losses["measured"]
    assert found.chosen == whole.chosen


def test_equal_calls_find_equal_recipes(net):
    model, data, found = net
    again = qpass.search(model, "6 bits", candidates=CANDIDATES, calibration=data)
    assert again.recipe == found.recipe
    assert again.losses == found.losses


def test_every_choice_has_been_weighed(net):
    """The least of the measured sums over all recipes within the budget, by trying them all."""
    found = net[2]
    loss, table = found.losses["measured"], found.tables["bits"]
    names = [g.name for g in found.groups]
    sums = [
        sum(loss[pair] for pair in zip(names, row, strict=True))
        for row in itertools.product(*(g.takes for g in found.groups))
        if table.total(dict(zip(names, row, strict=True))) <= 6
    ]
    assert found.predicted["measured"] == pytest.approx(min(sums), rel=1e-9)


def test_the_front_is_part_of_the_report(net, tmp_path):
    model, data, found = net
    found.plan.save(tmp_path / "net.plan")
    q = qpass.compile(model, plan=qpass.Plan.load(tmp_path / "net.plan"), example_inputs=data[0], backend="reference")
    report = qpass.inspect(q)
    document = json.loads(report.to_json())
    assert document["front"]["points"] == [{"cost": p.cost, "loss": p.loss} for p in found.front]
    assert document["front"]["chosen"] == {
        "cost": found.cost,
        "predicted": found.predicted["measured"],
        "loss": found.loss,
    }
    schema = json.loads((Path(qpass.__file__).parent / "inspect/schema.json").read_text())
    pytest.importorskip("jsonschema").validate(document, schema)
    report.to_html(tmp_path / "page.html")
    assert '"front":{"unit":"bits"' in (tmp_path / "page.html").read_text()
