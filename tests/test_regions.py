"""Which regions of a graph share one generated kernel: those that compute the same, whatever sites and sizes are called."""

import torch
from torch import nn

import qpass
from tests.models import relative


def test_types_of_inputs_are_part_of_a_kernel():
    """u4 and u8 in one process, and in one model: each clamps at its own last code."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    x = torch.randn(96, 64)
    for scheme, recipe in (("w4a4", None), ("w8a8", None), ("w8a8", {"2": "w4a4"})):
        plan = qpass.analyze(model, scheme, x, [x], recipe)
        wanted = qpass.compile(model, plan=plan, backend="reference")(x)
        assert relative(qpass.compile(model, plan=plan, backend="cpu")(x), wanted) < 1e-5
