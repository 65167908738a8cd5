"""Ranges: one pass or many, one process or many, the same to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.errors import QpassError
from qpass.qtype import QType
from qpass.range_choice import METHODS, choose_range
from qpass.ranges import Range, first_non_finite

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=8), min_size=1, max_size=6)
NARROW = st.floats(-1024, 1024, width=16)
ROWS = st.lists(st.lists(NARROW, min_size=3, max_size=3), min_size=1, max_size=4)


def observe(batches, **kept):
    seen = Range.empty(**kept)
    for batch in batches:
        seen = seen.update(torch.as_tensor(batch))
    return seen


def same(a, b):
    a, b = a.to_tensors(), b.to_tensors()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@given(BATCHES, BATCHES, BATCHES)
def test_merge_is_associative_and_commutative(x, y, z):
    a, b, c = observe(x), observe(y), observe(z)
    assert same(Range.merge(Range.merge(a, b), c), Range.merge(a, Range.merge(b, c)))
    assert same(Range.merge(a, b), Range.merge(b, a))


@given(BATCHES, st.randoms(use_true_random=False))
def test_batching_and_order_do_not_matter(batches, random):
    flat = [value for batch in batches for value in batch]
    shuffled = random.sample(batches, len(batches))
    whole = observe([flat])
    assert same(observe(batches), whole)
    assert same(observe(shuffled), whole)
    assert same(observe([[value] for value in flat]), whole)


@given(st.lists(ROWS, min_size=2, max_size=6), st.integers(0, 6))
def test_processes_make_the_range_of_one_process(batches, cut):
    one = observe(batches, channels=3)
    parts = observe(batches[:cut], channels=3), observe(batches[cut:], channels=3)
    assert same(Range.merge(*parts), one)
    assert same(Range.merge(*reversed(parts)), one)


@settings(max_examples=10)
@given(BATCHES, st.integers(0, 6), st.sampled_from([name for name, _ in METHODS]))
def test_processes_choose_the_limits_of_one_process(batches, cut, method):
    split = Range.merge(observe(batches[cut:]), observe(batches[:cut]))
    for text in ("u8/t", "i8/t"):
        ours = choose_range(split, QType.parse(text), method)
        assert all(map(torch.equal, ours, choose_range(observe(batches), QType.parse(text), method)))


def test_channel_sums_do_not_depend_on_order():
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) * 1.7**i for i in range(12)]
    forward, backward = observe(batches, channels=16), observe(batches[::-1], channels=16)
    assert same(forward, backward)


@given(BATCHES)
def test_an_empty_range_changes_nothing(batches):
    seen = observe(batches)
    assert same(Range.merge(seen, Range.empty()), seen)
    assert same(Range.merge(Range.empty(), seen), seen)


def test_what_is_kept():
    x = torch.tensor([[[1.0, -4.0], [3.0, 0.0]]])
    seen = observe([x, -x], channels=2)
    assert (seen.count, seen.lo, seen.hi) == (8, -4.0, 4.0)
    assert seen.histogram.sum() == 8
    c = seen.channels
    assert c.rows == 4
    assert (c.lo.tolist(), c.hi.tolist(), c.absmax.tolist()) == ([-3.0, -4.0], [3.0, 4.0], [3.0, 4.0])
    assert (c.mean.tolist(), c.abs_mean.tolist()) == ([0.0, 0.0], [2.0, 2.0])
    assert {t.dtype for t in (c.lo, c.hi, c.absmax, c.mean, c.abs_mean)} == {torch.float32}


def test_statistics_of_nothing():
    c = Range.empty(channels=2).channels
    assert (c.absmax.tolist(), c.mean.tolist(), c.abs_mean.tolist()) == ([0, 0], [0, 0], [0, 0])


def test_channels_on_another_axis():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert Range.empty(channels=3).update(x, axis=1).channels.hi.tolist() == [15.0, 19.0, 23.0]
    with pytest.raises(QpassError, match="expected 3 channels on axis -1"):
        Range.empty(channels=3).update(x)


def test_memory_does_not_grow():
    def size(seen):
        return sum(t.numel() for t in seen.to_tensors().values())

    assert size(observe([torch.randn(1000)] * 20)) == size(observe([torch.randn(1)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes_are_seen_as_float32(dtype):
    x = (torch.randn(50) * 10).to(dtype)
    assert same(observe([x]), observe([x.float()]))


def test_a_value_without_elements_is_nothing():
    assert observe([torch.empty(0, 4)]).count == 0


def test_both_zeros_are_one_value():
    assert same(observe([[0.0], [-0.0]]), observe([[-0.0], [0.0]]))
    columns = [torch.zeros(1, 2), -torch.zeros(1, 2)]
    assert torch.signbit(observe(columns, channels=2).channels.lo).sum() == 0


def test_gradients_are_not_recorded():
    x = torch.randn(4, 2, requires_grad=True)
    assert not any(t.requires_grad for t in observe([x], channels=2).to_tensors().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    x = torch.zeros(2, 3)
    x[1, 2] = bad
    with pytest.raises(QpassError, match=r"at \[1, 2\] of shape \[2, 3\]; 1 of 6"):
        Range.empty().update(x)


def test_first_non_finite():
    assert first_non_finite(torch.ones(3)) is None
    assert first_non_finite(torch.tensor(float("inf"))).startswith("inf at []")
    assert "2 of 3" in first_non_finite(torch.tensor([float("nan"), 1.0, float("inf")]))


@pytest.mark.parametrize("kept", [{}, {"channels": 2}, {"histogram": False}, {"channels": 2, "histogram": False}])
def test_round_trip_through_tensors(kept):
    for seen in (Range.empty(**kept), observe([torch.randn(5, 2)], **kept)):
        assert same(Range.from_tensors(seen.to_tensors()), seen)


def test_from_tensors_says_what_is_missing():
    with pytest.raises(QpassError, match="lacks limits"):
        Range.from_tensors({"count": torch.tensor(1)})


def test_merge_refuses_different_statistics():
    with pytest.raises(QpassError, match="same statistics, not no channels and histogram and 2 channels"):
        Range.merge(Range.empty(), Range.empty(channels=2))
    with pytest.raises(QpassError, match="same statistics"):
        Range.merge(Range.empty(), Range.empty(histogram=False))
