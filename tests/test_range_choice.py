"""Range choice: each method against the definition it claims, and against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.affine import choose_qparams, fake_quantize
from qpass.errors import QpassError
from qpass.qtype import QType
from qpass.range_choice import METHODS, Observer, choose_range, expected_error, observer_for, parse_method
from qpass.ranges import Range

U8, I8, U4, E4M3 = (QType.parse(text) for text in ("u8/t", "i8/t", "u4/t", "e4m3/t"))
VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50)


def heavy_tailed(seed=0, size=20000):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return x * x.abs() ** 2


def seen(x):
    return Range.empty().update(x)


def measured_error(x, lo, hi, qtype):
    return (fake_quantize(x, choose_qparams(lo, hi, qtype)) - x).square().mean().item()


@settings(max_examples=25)
@given(VALUES, st.sampled_from([U8, I8, U4, E4M3]), st.sampled_from([name for name, _ in METHODS]))
def test_limits_stay_within_what_was_seen_and_are_usable(values, qtype, method):
    x = torch.tensor(values)
    lo, hi = choose_range(seen(x), qtype, method)
    assert (lo.dtype, lo.shape, hi.dtype, hi.shape) == (torch.float32, (), torch.float32, ())
    bound = x.abs().max() if qtype.symmetric else torch.tensor([0.0])
    assert min(x.min().item(), -bound.item(), 0.0) <= lo <= hi <= max(x.max().item(), bound.item(), 0.0)
    choose_qparams(lo, hi, qtype).check()


def test_minmax_is_exact():
    x = heavy_tailed()
    lo, hi = choose_range(seen(x), U8, "minmax")
    assert (lo, hi) == (x.min(), x.max())


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
def test_percentile_keeps_that_share(percent):
    x = heavy_tailed(size=200_000)
    lo, hi = choose_range(seen(x), U8, f"percentile:{percent}")
    tail = (100 - percent) / 200
    width = (x.max() - x.min()) / 1024
    assert abs(hi - x.quantile(1 - tail)) <= width
    assert abs(lo - x.quantile(tail)) <= width
    assert ((x >= lo) & (x <= hi)).float().mean() >= percent / 100


def test_percentile_defaults_to_9999_and_100_is_minmax():
    r = seen(heavy_tailed())
    assert choose_range(r, U8, "percentile") == choose_range(r, U8, "percentile:99.99")
    assert choose_range(r, U8, "percentile:100") == choose_range(r, U8, "minmax")


@pytest.mark.parametrize("qtype", [U8, I8, U4, QType.parse("i4/t"), QType.parse("u2/t"), E4M3], ids=str)
def test_mse_is_at_least_as_good_as_a_brute_force_grid(qtype):
    x = heavy_tailed()
    r = seen(x)
    ours = measured_error(x, *choose_range(r, qtype, "mse"), qtype)
    grid = torch.linspace(0.02, 1.0, 50)
    full = torch.stack([x.min(), x.max()])
    best = min(measured_error(x, *(full * factor), qtype) for factor in grid)
    assert ours <= best * 1.02


def test_mse_shrinks_each_end_on_its_own():
    x = torch.cat([heavy_tailed().abs(), torch.tensor([-0.5])])
    lo, hi = choose_range(seen(x), U4, "mse")
    assert hi < 0.6 * x.max()
    assert lo >= -0.5


def test_mse_keeps_the_range_of_a_uniform_distribution():
    x = torch.linspace(-1, 1, 10001)
    lo, hi = choose_range(seen(x), U8, "mse")
    assert lo <= -0.98
    assert hi >= 0.98


@pytest.mark.parametrize("qtype", [U8, U4, I8], ids=str)
def test_expected_error_predicts_the_measured_error(qtype):
    x = heavy_tailed()
    for method in ("minmax", "mse", "percentile:99"):
        lo, hi = choose_range(seen(x), qtype, method)
        assert expected_error(seen(x), qtype, lo, hi) == pytest.approx(measured_error(x, lo, hi, qtype), rel=0.1)


@pytest.mark.parametrize("qtype", [U8, I8, U4], ids=str)
def test_entropy_clips_outliers_and_keeps_the_bulk(qtype):
    x = torch.cat([torch.randn(50_000, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0, -20.0])])
    lo, hi = choose_range(seen(x), qtype, "entropy")
    assert hi < 20
    assert hi > 2
    assert lo < -2


def test_entropy_keeps_a_uniform_distribution():
    lo, hi = choose_range(seen(torch.linspace(0, 1, 100_001)), U8, "entropy")
    assert hi >= 0.98
    assert lo == 0


def test_a_range_on_one_side_keeps_zero_as_its_end():
    x = heavy_tailed().abs() + 1
    for method in ("mse", "entropy"):
        assert choose_range(seen(x), U8, method)[0] == 0
        assert choose_range(seen(-x), U8, method)[1] == 0


def test_per_channel_limits():
    x = torch.randn(10, 3)
    r = Range.empty(channels=3, histogram=False).update(x)
    lo, hi = choose_range(r, QType.parse("i8/c1"), "minmax")
    assert torch.equal(lo, x.amin(0))
    assert torch.equal(hi, x.amax(0))


@pytest.mark.parametrize(
    ("range", "text", "method", "match"),
    [
        (Range.empty(), "u8/t", "minmax", "no values were seen"),
        (seen(torch.ones(1)), "u8/token", "minmax", "at run time"),
        (seen(torch.ones(1)), "i8/c1", "minmax", "limits per channel"),
        (seen(torch.ones(1)), "i8/c1", "mse", "one scale per tensor"),
        (Range.empty(histogram=False).update(torch.ones(1)), "u8/t", "mse", "reads a histogram"),
        (seen(torch.ones(1)), "u8/t", "mmse", "Did you mean 'mse'"),
        (seen(torch.ones(1)), "u8/t", "mse:3", "only percentile takes a number"),
        (seen(torch.ones(1)), "u8/t", "percentile:", "above 50"),
        (seen(torch.ones(1)), "u8/t", "percentile:101", "up to 100"),
    ],
)
def test_says_what_is_missing(range, text, method, match):
    with pytest.raises(QpassError, match=match):
        choose_range(range, QType.parse(text), method)


def test_observers():
    assert observer_for(U8) == Observer(channels=False, histogram=False)
    assert observer_for(U8, "percentile:99") == Observer(channels=False, histogram=True)
    assert observer_for(QType.parse("i8/c1")) == Observer(channels=True, histogram=False)
    assert observer_for(QType.parse("u8/token")) is None


def test_parse_method():
    assert [parse_method(name)[:2] for name, _ in METHODS] == list(METHODS)
    assert parse_method("percentile:99.9")[2] == 99.9
