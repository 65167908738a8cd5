"""A compiled model that is watched: what a monitor sees is what calibration would, calls are as ever, looks cost little."""

import pytest
import torch
from torch import nn

import qpass
from qpass.runtime import runtime_of
from tests.models import batches, encoder


def compiled(model, scheme="w8a8", backend="reference", shape=(4, 6, 32), count=12):
    return qpass.compile(model, scheme, torch.randn(shape), batches(count, shape), backend=backend)


@pytest.fixture
def q():
    return compiled(encoder())


def test_what_calibration_saw_is_no_drift(q):
    with qpass.monitor(q, share=None) as m:
        for x in batches(12):
            q(x)
    report = m.report()
    assert [r.status for r in report] == ["ok"] * 4
    assert {site for r in report for site in r.sites} == {d.site for d in runtime_of(q).plan if d.static}
    assert all(r.psi < 0.02 and r.clipped < 0.003 for r in report)
    assert report.looks == report.calls == 12
    assert report.rows[0].stats.samples == 48
    q(torch.randn(4, 6, 32))
    assert m.report().looks == 12, "it was stopped"


def test_what_is_seen_is_the_inputs_of_the_sites():
    """Counted by hand: a linear's own input, and one behind a factor, without it."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    q = compiled(model, shape=(64, 16))
    m = qpass.monitor(q, share=None)
    xs = [torch.randn(64, 16) * 1.5 for _ in range(3)]
    for x in xs:
        q(x)
    first, second = (m.seen()[name] for name in ("0:linear.0", "2:linear.0"))
    real = torch.cat(xs)
    assert first.raw is not None, "smooth gives it a factor"
    assert first.source.lo == pytest.approx(float(real.min()), rel=1e-4)
    assert first.source.hi == pytest.approx(float(real.max()), rel=1e-4)
    assert first.values == real.numel()
    plan = runtime_of(q).plan
    d = plan["0:linear.0"]
    scaled = (real - d.input_shift) * d.packed.in_mul
    lo, hi = next(r.grid for r in m.report() if r.site == "0:linear.0")
    assert first.below + first.above == int(((scaled < lo) | (scaled > hi)).sum())
    hidden = model[1](model[0](real))
    assert second.source.hi == pytest.approx(float(hidden.detach().max()), rel=0.05)


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w4a4", "fp8-static", "w8a8,smooth=none,split=none", "w8a8,range=percentile:99"]
)
def test_schemes(scheme):
    q = compiled(encoder(), scheme)
    with qpass.monitor(q, share=None) as m:
        for x in batches(9):
            q(x)
    assert not m.report().drifting, str(m)
    assert m.errors == 0


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
def test_convolutions(pool):
    """A pool makes larger values than those it reads, which share their scale: each is compared with its own."""
    convs = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        pool,
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    ]
    q = compiled(nn.Sequential(*convs).eval(), shape=(6, 3, 12, 12))
    with qpass.monitor(q, share=None) as m:
        for x in batches(10, (6, 3, 12, 12)):
            q(x)
        assert not m.report().drifting, str(m)
        assert all(r.psi < 0.03 for r in m.report())
        for x in batches(10, (6, 3, 12, 12)):
            q(x * 2)
    assert m.report().rows[0].status == "drift"


def test_drift_is_told_once_and_again_when_it_comes_back(q):
    told = []
    m = qpass.monitor(q, share=None, window=16, on_drift=told.append)
    steps = []
    for factor in (1, 3, 1, 3):
        for x in batches(24):
            q(x * factor)
        steps.append([r.site for r in told])
    first = "0.q:linear.0"
    assert first not in steps[0]
    assert steps[1].count(first) == steps[2].count(first) == 1
    assert steps[3].count(first) == 2
    assert next(r for r in told if r.site == first).sites == ("0.q:linear.0", "0.k:linear.0", "0.v:linear.0")
    assert "PSI" in str(told[0])
    assert m.report().drifting


def test_results_and_random_numbers_are_those_of_an_unwatched_model(q):
    xs = batches(3)
    plain = [q(x) for x in xs]
    torch.manual_seed(5)
    wanted = torch.rand(4)
    with qpass.monitor(q, share=None):
        torch.manual_seed(5)
        watched = [q(x) for x in xs]
        assert torch.equal(torch.rand(4), wanted)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    again = [q(x) for x in xs]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class Counting(nn.Module):
    """Adds what it sees to a buffer, and to its argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x, cache):
        y = self.layer(x)
        self.total += y.sum(0)
        cache.add_(y)
        return y + self.total + cache


def test_state_is_written_once():
    def run(watched):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Counting().eval()
        q = qpass.compile(model, "w8a8", (torch.randn(4, 8), torch.zeros(4, 8)),
                          [(torch.randn(4, 8), torch.zeros(4, 8)) for _ in range(4)], backend="reference")  # fmt: skip
        m = qpass.monitor(q, share=None) if watched else None
        cache, outs = torch.zeros(4, 8), []
        for i in range(4):
            outs.append(q(torch.full((4, 8), i / 4), cache))
        assert m is None or (m.report().looks == 4 and m.errors == 0)
        return [*outs, cache, q.total.clone()]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_graphs_that_come_later_are_watched_too(q):
    m = qpass.monitor(q, share=None)
    before = len(runtime_of(q).kept)
    q(torch.randn(1, 3, 32))  # batch 1 has a graph of its own
    q(torch.randn(1, 3, 32))
    assert len(runtime_of(q).kept) > before
    assert m.seen()["0.q:linear.0"].samples == 2


def test_padding_is_not_looked_at():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.layer(x) * attention_mask[..., None]

    def batch():
        mask = torch.ones(4, 6, dtype=torch.int64)
        mask[:, 4:] = 0
        return {"x": torch.where(mask[..., None] > 0, torch.randn(4, 6, 8), 50.0), "attention_mask": mask}

    q = qpass.compile(Masked().eval(), "w8a8", batch(), [batch() for _ in range(8)], backend="reference")
    with qpass.monitor(q, share=None) as m:
        for _ in range(9):
            q(**batch())
    (row,) = m.report()
    assert row.status == "ok"
    assert row.stats.source.hi < 10
    assert row.stats.values == 9 * 4 * 4 * 8


def test_an_error_in_a_look_is_counted_and_told_once(q):
    m = qpass.monitor(q, share=None)
    x = torch.randn(4, 6, 32)
    wanted = q(x)
    broken = x.clone()
    broken[0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="could not look at a call") as told:
        [q(broken) for _ in range(3)]
    assert len(told) == 1
    assert m.errors == 3
    assert "3 looks failed" in str(m)
    assert torch.equal(q(x), wanted)
    assert m.report().looks == 5
