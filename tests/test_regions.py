"""Which regions of a graph share one generated kernel: those that compute the same, whatever sites and sizes are called."""

import torch
from torch import nn

import qpass
from qpass.backends.native import conv_lower
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


class Upwards(nn.Module):
    """A transposed convolution, which no integer kernel but ours runs on a CPU, and what reads it pixel by pixel."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.out = nn.ConvTranspose2d(8, 16, 2, 2), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        y = self.up(x)
        return self.out(self.norm(y.permute(0, 2, 3, 1)) + (y * 2).permute(0, 2, 3, 1))


def test_the_reference_of_a_convolution_lies_in_memory_as_its_kernels_are_told(monkeypatch):
    monkeypatch.setattr(conv_lower, "why_not_conv", lambda node: "a test keeps the reference")
    torch.manual_seed(0)
    model = Upwards().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    plan = qpass.analyze(model, "w8a8", x, [x])
    with torch.no_grad():
        wanted = qpass.compile(model, plan=plan, example_inputs=x, backend="reference")(x)
        q = qpass.compile(model, plan=plan, example_inputs=x, backend="cpu")
        assert relative(q(x), wanted) < 1e-2
    kept = {site for site, _ in qpass.inspect(q).record().kept}
    assert "up:conv_transpose2d.0" in kept, kept
