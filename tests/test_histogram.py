"""Histograms: canonical layout, exact counts, exact widening."""

import math
from bisect import bisect_left, bisect_right

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpass.histogram import BINS, count, edges, layout, widen

FLOAT_MAX = torch.finfo(torch.float32).max
FLOATS = st.floats(-FLOAT_MAX, FLOAT_MAX, width=32)
VALUES = st.lists(FLOATS, min_size=1, max_size=30)


def ends(values):
    return min(values), max(values)


@given(VALUES)
def test_every_value_lies_in_its_bin(values):
    lo, hi = ends(values)
    counts, bounds = count(torch.tensor(values), lo, hi), edges(lo, hi).tolist()
    bins = [bisect_left(bounds, v) - 1 if v < 0 else bisect_right(bounds, v) - 1 for v in values]
    assert (counts.dtype, counts.shape) == (torch.int64, (BINS,))
    assert counts.tolist() == torch.bincount(torch.tensor(bins), minlength=BINS).tolist()
    assert bounds[0] < min(lo, 0.0) or lo >= 0
    assert hi < bounds[-1]


@given(VALUES, VALUES)
def test_widening_equals_counting_in_the_wider_layout(values, more):
    old, new = ends(values), ends(values + more)
    x = torch.tensor(values)
    assert torch.equal(widen(count(x, *old), old, new), count(x, *new))


@given(FLOATS, FLOATS)
def test_at_least_1024_bins_span_a_range(a, b):
    lo, hi = min(a, b, 0.0), max(a, b, 0.0)
    exponent, first = layout(lo, hi)
    used = math.trunc(math.ldexp(hi, -exponent)) - first + 1
    assert used <= BINS
    assert used >= BINS // 2 or exponent == -126


@given(FLOATS, FLOATS, FLOATS, FLOATS)
def test_a_wider_range_never_has_finer_bins(a, b, c, d):
    narrow, wide = (min(a, b), max(a, b)), (min(a, b, c, d), max(a, b, c, d))
    assert layout(*narrow)[0] <= layout(*wide)[0]


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45, 1e-38, FLOAT_MAX, -FLOAT_MAX])
def test_extreme_constants(value):
    assert count(torch.full((3,), value), value, value).sum() == 3


def test_a_bin_holds_its_edge_nearer_to_zero():
    assert count(torch.tensor([0.0, 1.0, 2.0]), 0.0, 2.0).nonzero().flatten().tolist() == [0, 512, 1024]
    mirrored = count(torch.tensor([-0.0, -1.0, -2.0]), -2.0, 0.0).nonzero().flatten() + layout(-2.0, 0.0)[1]
    assert mirrored.tolist() == [-1025, -513, 0]


@pytest.mark.parametrize("tiny", [-1e-45, -1e-38, 1e-45, 1e-38])
@pytest.mark.parametrize("huge", [1.0, 2047.0, 1e38])
def test_tiny_values_keep_their_side_of_zero_in_wide_ranges(tiny, huge):
    counts = count(torch.tensor([tiny, -huge, huge]), -huge, huge)
    bin_of_zero = -layout(-huge, huge)[1]
    assert counts[bin_of_zero - (tiny < 0)] == 1
    old = (min(tiny, 0.0), max(tiny, 0.0))
    assert widen(count(torch.tensor([tiny]), *old), old, (-huge, huge))[bin_of_zero - (tiny < 0)] == 1
