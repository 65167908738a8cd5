"""Counts by size add up, and their places are where the values are."""

import torch

from qpass.sizes import BINS, count, places


def test_counts_of_channels_add():
    rows = torch.randn(100, 3) * torch.tensor([1.0, 1e-3, 300.0])
    found = count(rows)
    assert found.shape == (3, BINS)
    assert found.sum(1).tolist() == [100] * 3
    assert torch.equal(found, count(rows[:40]) + count(rows[40:]))


def test_each_value_is_near_the_places_of_its_bin():
    values = torch.cat([torch.logspace(-4, 4, 200), -torch.logspace(-4, 4, 200), torch.tensor([0.0, -0.0])])
    bins = torch.stack([count(v.reshape(1, 1))[0].argmax() for v in values])
    assert ((places()[bins] - values[:, None]).abs() <= 0.25 * values.abs()[:, None]).all()


def test_what_lies_outside_is_in_the_outermost_bins():
    found = count(torch.tensor([[0.0], [1e-9], [-1e-9], [1e9], [-1e9]]))[0]
    assert (found[0], found[128], found[256]) == (3, 1, 1)
