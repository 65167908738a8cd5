"""Errors of sites, by themselves and at the model's output: against what a whole model with such sites gives."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import qpass
from qpass.inspect.errors import measure
from qpass.inspect.figures import Sums
from tests.models import FeedForward, TwoGraphs, batches, encoder, relative


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model, data = encoder(1), batches(3)
    return model, data, qpass.analyze(model, "w8a8", data[0], data)


def as_float(plan, keep):
    """A copy of a plan with only some sites quantized."""
    decisions = {d.site: d if not d.quantized or keep(d.site) else d.as_float("a test") for d in plan}
    return qpass.Plan(plan.scheme, decisions, plan.parameters)


def loss_of(model, plan, data):
    """Of a model that is compiled by the plan: what the reference backend computes."""
    q = qpass.compile(model, plan=plan, backend="reference")
    with torch.no_grad():
        noise = sum(float((q(x).double() - model(x).double()).square().sum()) for x in data)
        return noise / sum(float(model(x).double().square().sum()) for x in data)


def test_attention_of_another_type_is_told_of(net):
    """It is no site: what it does is not in the losses, and a note says so."""
    model, data, plan = net
    for kind, said in ((torch.bfloat16, True), (None, False)):
        asked = dataclasses.replace(plan, attention=kind)
        notes = measure(model, asked, iter(data[:1]), "squared error", alone=False).notes
        assert any("attention runs in bfloat16" in note for note in notes) == said


def test_losses_are_those_of_models_with_such_sites(net):
    model, data, plan = net
    found = measure(model, plan, iter(data), "squared error", alone=True)
    assert found.loss == pytest.approx(loss_of(model, as_float(plan, bool), data), rel=1e-3)  # attention as it is
    assert list(found.errors) == [d.site for d in plan.quantized]
    error = found.errors["1.up:linear.0"]
    assert error.loss_alone == pytest.approx(loss_of(model, as_float(plan, "1.up:linear.0".__eq__), data), rel=1e-2)
    assert error.loss_without == pytest.approx(loss_of(model, as_float(plan, "1.up:linear.0".__ne__), data), rel=1e-2)
    assert found.metric == "squared error"
    assert found.batches == 3


class Writes(nn.Module):
    """One graph, which writes to its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        buffer = torch.zeros_like(x)
        buffer[:, 1:] = self.a(x)[:, 1:]
        return self.b(buffer)


@pytest.mark.parametrize("kind", [TwoGraphs, Writes])
def test_losses_of_calls_that_cannot_be_resumed(kind):
    torch.manual_seed(0)
    model, data = kind().eval(), batches(2, (4, 8))
    plan = qpass.analyze(model, "w8a8", data[0], data)
    found = measure(model, plan, data, "squared error", alone=True)
    first = found.errors["a:linear.0"].loss_alone
    assert first == pytest.approx(loss_of(model, as_float(plan, "a:linear.0".__eq__), data), rel=1e-2)
    last = found.errors["b:linear.0"]  # what is left of the error without b is what a alone makes of it
    assert last.loss_without == pytest.approx(first, rel=1e-3)


class Named(nn.Module):
    """An output with logits by name."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return {"logits": self.head(x), "hidden": x}


def test_logits_are_compared_by_kl():
    torch.manual_seed(0)
    model, data = Named().eval(), batches(2, (3, 5, 16))
    plan = qpass.analyze(model, "w4a8", data[0], data)
    found = measure(model, plan, data, "auto", alone=True)
    q = qpass.compile(model, plan=plan, backend="reference")
    p, r = (torch.cat([m(x)["logits"] for x in data]).detach().log_softmax(-1) for m in (model, q))
    wanted = float((p.exp() * (p - r)).sum(-1).mean())
    assert found.metric == "kl"
    assert found.loss == pytest.approx(wanted, rel=1e-2)
    assert found.errors["head:linear.0"].loss_alone == pytest.approx(wanted, rel=1e-2)
    assert found.errors["head:linear.0"].loss_without == pytest.approx(0, abs=1e-6)


def test_a_function_gets_both_outputs_of_the_model():
    torch.manual_seed(0)
    model, data, seen = Named().eval(), batches(2, (3, 5, 16)), []

    def wrong(output, wanted):
        seen.append(set(output) | set(wanted))
        return (output["logits"].argmax(-1) != wanted["logits"].argmax(-1)).float().mean()

    q = qpass.compile(model, "w2a16", data[0], backend="reference")
    report = qpass.inspect(q, model, data, metric=wrong, alone=True)
    assert report.measured.metric == "wrong"
    assert report.measured.loss == report.errors["head:linear.0"].loss_alone > 0
    assert len(seen) == 2 * 3
    assert seen[0] == {"logits", "hidden"}


def test_figures_of_a_site():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 8)).eval(), batches(2, (64, 16))
    plan = qpass.analyze(model, "w8a8", data[0], data)
    data[1][0, 0] = 50.0  # far beyond the range
    (error,) = measure(model, plan, data).errors.values()
    q = qpass.compile(model, plan=plan, backend="reference")
    with torch.no_grad():
        wanted, found = (torch.cat([m(x) for x in data]) for m in (model, q))
    assert error.sqnr == pytest.approx(-20 * math.log10(relative(found, wanted)), abs=0.05)
    assert error.worst == pytest.approx(float((found - wanted).abs().max()), rel=1e-3)
    assert error.cosine == pytest.approx(float(torch.cosine_similarity(found.flatten(), wanted.flatten(), 0)), abs=1e-5)
    assert error.clipped == pytest.approx(1 / 2048)
    assert sum(error.histogram.counts) == 2048
    assert error.histogram.lo <= -3 < 50 <= error.histogram.hi
    assert error.histogram.counts[0] > 0 < error.histogram.counts[-1]
    assert len(error.scatter[0]) == len(error.scatter[1]) == 200
    assert error.scatter[0][0] == pytest.approx(float(wanted[0, 0]))
    assert error.scatter[0][-1] == pytest.approx(float(wanted[63, -1]))


def test_a_generator_is_read_once_and_forgotten(net):
    model, data, plan = net
    alive = []

    def given():
        import weakref

        for x in data * 3:
            own = x.clone()
            alive.append(weakref.ref(own))
            yield own
            del own
            assert sum(ref() is not None for ref in alive) <= 2

    found = measure(model, plan, given())
    whole = measure(model, plan, data)
    for site, error in found.errors.items():
        assert error.sqnr == pytest.approx(whole.errors[site].sqnr, abs=1e-6)


def test_padded_rows_are_left_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.a(x)

    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    plan = qpass.analyze(model, "w8a8", (x, mask), [(x, mask)])
    x[0, 3:] = 1000.0
    (error,) = (found := measure(model, plan, [(x, mask)], "squared error")).errors.values()
    assert error.clipped == 0
    assert sum(error.histogram.counts) == 8 * 8
    assert found.loss < 1e-3


def test_a_table_of_integers_has_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 4)).eval()
    ids = torch.randint(0, 20, (3, 7))
    plan = qpass.analyze(model, "w8a16", ids, recipe={"0": "w8a16", "1": None})
    found = measure(model, plan, [ids], "squared error", alone=True)
    table = found.errors["0:embedding.0"]
    assert 30 < table.sqnr < 60
    assert table.loss_alone == found.loss > 0
    assert table.loss_without == 0


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a16-g32"])
def test_simulated_products_are_those_of_the_reference(scheme):
    torch.manual_seed(0)
    model, data = FeedForward().eval(), batches(4)
    plan = qpass.analyze(model, scheme, data[0], data)
    loss = measure(model, plan, data, "squared error").loss
    assert loss == pytest.approx(loss_of(model, plan, data), rel=2e-2)


def test_sums_of_nothing(net):
    plan = net[2]
    empty = Sums(plan.quantized[0]).finish()
    assert (empty.sqnr, empty.cosine, empty.histogram, empty.clipped) == (math.inf, 1.0, None, None)
