"""Bins of calibration, and the formulas of drift: against definitions written out, and how often they are wrong."""

import math

import pytest
import torch

from qpass import histogram
from qpass.qtype import QType
from qpass.ranges import Range
from qpass.seen import Seen, clipped_of, count, grid, seen_of
from qpass.serving.collect import VALUES, Bins, Stats, range_of, spread
from qpass.serving.drift import DRIFT, FEW, OK, UNKNOWN, Limits, judge, kl, noise, psi


def range_with(x):
    return Range.empty().update(x)


def stats_of(seen, looks, clip=None):
    """Stats of several looks, each a tensor."""
    whole = Stats()
    for x in looks:
        beyond = 0 if clip is None else int((x > clip).sum())
        found = range_of(x, x)
        bins = None if seen is None else Bins.of(x, seen.edges)
        whole = whole.merge(Stats(1, len(x), x.numel(), 0, beyond, found, None, None, bins))
    return whole


def in_bins(x, edges):
    """Counts, by the rule in words: a bin holds the edge nearer to zero."""
    found = [0] * (len(edges) + 1)
    for value in x.flatten().tolist():
        found[sum(value >= e if e >= 0 else value > e for e in edges.tolist())] += 1
    return found


@pytest.mark.parametrize("make", [torch.randn, lambda n: torch.randn(n).relu(), lambda n: torch.randn(n).round() / 4])
def test_bins_hold_what_they_say(make):
    x = make(5000)
    seen = seen_of(range_with(x))
    assert float(seen.shares.sum()) == pytest.approx(1)
    assert bool((seen.edges.diff() > 0).all())
    assert in_bins(x, seen.edges) == count(x, seen.edges).tolist()
    assert torch.allclose(count(x, seen.edges) / len(x), seen.shares, atol=1e-12)
    atoms = torch.unique(x, return_counts=True)[1].max() / len(x)
    assert float(seen.shares.max()) < max(2 / 16, float(atoms) + 0.01)
    assert len(seen.shares) <= 16 + 2


def test_values_that_many_share_have_a_bin():
    x = torch.cat([torch.zeros(600), torch.full((300,), 0.5), torch.rand(100)])
    seen = seen_of(range_with(x))
    assert (seen.shares > 0.28).sum() == 2


def test_nothing_seen_gives_no_bins():
    assert seen_of(Range.empty()) is None
    assert seen_of(Range.empty(histogram=False).update(torch.randn(9))) is None
    constant = seen_of(range_with(torch.zeros(20)))
    assert len(constant.edges) == 0
    assert constant.shares.tolist() == [1.0]


def test_what_a_grid_clips():
    scale, zero = torch.tensor(0.1), torch.tensor(100, dtype=torch.int32)
    assert grid(scale, zero, QType.parse("u8/t")) == pytest.approx((-10.05, 15.55))
    assert grid(scale, None, QType.parse("e4m3/t")) == pytest.approx((-44.8, 44.8))
    x = torch.linspace(-20, 20, 10001)
    share = float(((x < -10.05) | (x > 15.55)).double().mean())
    assert clipped_of(range_with(x), -10.05, 15.55) == pytest.approx(share, abs=0.001)
    assert clipped_of(range_with(x), -20, 20) == 0


def test_formulas():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    assert psi(p, q) == pytest.approx(sum((a - b) * math.log(a / b) for a, b in ((0.7, 0.5), (0.2, 0.25), (0.1, 0.25))))
    assert kl(p, q) == pytest.approx(0.7 * math.log(1.4) + 0.2 * math.log(0.8) + 0.1 * math.log(0.4))
    assert psi(p, q) == pytest.approx(kl(p, q) + kl(q, p))
    assert psi(p, p) == kl(p, p) == 0
    assert math.isfinite(psi(torch.tensor([1.0, 0]), torch.tensor([0.0, 1])))


def test_noise_is_the_index_that_chance_makes():
    """Looks whose values are alike: the index of an unshifted sample is the noise, on average; a naive one is far less."""
    torch.manual_seed(1)
    text = lambda: torch.randn(1) * 0.7 + torch.randn(200) * 0.7
    seen = seen_of(range_with(torch.cat([text() for _ in range(4000)])))
    indices, noises = [], []
    for _ in range(60):
        stats = stats_of(seen, [text() for _ in range(40)])
        indices.append(psi(stats.bins.counts / stats.bins.total, seen.shares))
        noises.append(noise(stats.bins, stats.looks, seen.shares))
    mean = sum(indices) / len(indices)
    assert sum(noises) / len(noises) == pytest.approx(mean, rel=0.25)
    assert mean > 5 * 15 / (40 * 200)


def test_judgement():
    torch.manual_seed(0)
    seen, limits = seen_of(range_with(torch.randn(20000))), Limits()
    look = lambda scale=1.0: torch.randn(300) * scale
    assert judge(stats_of(seen, [look() for _ in range(20)]), seen, limits).status == OK
    assert judge(stats_of(seen, [look() for _ in range(7)]), seen, limits).status == FEW
    assert judge(stats_of(seen, [look(2.0) for _ in range(20)]), seen, limits).status == DRIFT
    assert judge(stats_of(None, [look(2.0) for _ in range(20)]), None, limits).status == UNKNOWN
    assert judge(stats_of(seen, [look() for _ in range(20)], clip=2.0), seen, limits).status == DRIFT
    known = Seen(seen.edges, seen.shares, clipped=0.03)
    assert judge(stats_of(known, [look() for _ in range(20)], clip=2.0), known, limits).status == OK
    between = stats_of(seen, [look(1.4) for _ in range(20)])
    score = judge(between, seen, limits).score
    narrow = Limits(psi=score * 1.5)
    assert judge(between, seen, narrow).status == OK
    assert judge(between, seen, narrow, drifting=True).status == DRIFT


def test_merging_is_the_same_in_any_order():
    seen = seen_of(range_with(torch.randn(4000)))
    looks = [torch.randn(50 + i) * (1 + i) for i in range(5)]
    one, other = stats_of(seen, looks), stats_of(seen, looks[3:]).merge(stats_of(seen, looks[:3]))
    assert (one.looks, one.samples, one.values) == (other.looks, other.samples, other.values)
    assert torch.equal(one.grid.histogram, other.grid.histogram)
    for a, b in zip(one.bins.parts(), other.bins.parts(), strict=True):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b))
    assert Stats().merge(one) == one or Stats().merge(one).samples == one.samples


@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 7), -1), ((2, 6, 4, 5), 1), ((9,), -1), ((700, 1200), -1)])
def test_values_are_evenly_spread(shape, axis):
    x = torch.arange(math.prod(shape)).float().reshape(shape)
    rows = spread(x, axis, 0.3)
    assert rows.shape[1] == shape[axis]
    assert rows.numel() <= VALUES
    if x.numel() <= VALUES:
        assert sorted(rows.flatten().tolist()) == x.flatten().tolist()
    else:
        assert rows.numel() > VALUES / 2
        assert float((rows.mean() - x.mean()).abs() / x.mean()) < 0.01


def test_a_range_has_the_limits_of_all_values():
    x = torch.randn(4000)
    found = range_of(x, x[::7])
    assert (found.lo, found.hi, found.count) == (float(x.min()), float(x.max()), len(x[::7]))
    assert int(found.histogram.sum()) == found.count
    assert len(found.histogram) == histogram.BINS
    with pytest.raises(ValueError, match="not finite"):
        range_of(torch.tensor([1.0, math.nan]), torch.tensor([1.0]))
