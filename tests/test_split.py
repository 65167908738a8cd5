"""When a far channel is split."""

import torch
from torch.nn import functional

from qpass.solvers.split import copies, layout, pays

ENERGY = torch.ones(64)


def test_an_outlier_that_the_sample_lacks_still_counts():
    """The range was widened by a value that is not among the sampled rows."""
    sample = torch.randn(100, 64).relu()
    high = sample.amax(0)
    high[3] = 40.0
    extra, top = copies(high)
    assert extra[3] > 0
    assert pays(sample, ENERGY, (0.0, 40.0), extra, top, 255)


def test_gelu_is_not_split_where_its_bend_costs_more():
    """Channels that reach 0.6 to 1.2: the copies would be off by more than the finer step wins."""
    z = torch.randn(400, 64) * 0.3
    z[:, 0] *= 2
    sample = functional.gelu(z)
    extra, top = copies(sample.amax(0))
    assert int(extra.sum()) > 0
    assert not pays(sample, ENERGY, (float(sample.min()), float(sample.max())), extra, top, 255)


def test_layout_numbers_the_copies():
    channel, k = layout(torch.tensor([0, 2, 0, 1]))
    assert (channel.tolist(), k.tolist()) == ([1, 1, 3], [1, 2, 1])
