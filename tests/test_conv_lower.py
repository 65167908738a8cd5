"""What the native convolution takes over when a graph is lowered."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.backends import cpu
from qpass.runtime import runtime_of
from tests.models import relative
from tests.models_vision import smooth
from tests.test_native import needs_kernels


class Padded(nn.Module):
    """A convolution of stride 2 behind a pad, as networks that came from TensorFlow have it."""

    def __init__(self, widths, groups):
        super().__init__()
        self.widths = widths
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        more = widths[4] if len(widths) > 4 else 0
        self.second = nn.Conv2d(24 + more, 24 + more, 3, stride=2, groups=groups + more * (groups > 1))

    def forward(self, x):
        return self.second(F.pad(torch.relu(self.first(x)), self.widths))


@needs_kernels
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("widths", [(0, 1, 0, 1), (2, 0, 1, 3), (1, 0), (0, 1, 0, 1, 1, 0)])
def test_zeros_around_codes_are_padding(widths, groups, scheme, monkeypatch):
    monkeypatch.setattr(cpu, "has_amx", lambda: False)  # oneDNN's kernels are taken there, which want a pad in front
    model, x = Padded(widths, groups).eval(), smooth(3, (3, 13, 12))
    found = {}
    for backend in ("cpu", "reference"):
        q = qpass.compile(model, scheme, x, [x] if scheme == "w8a8" else None, backend=backend)
        with torch.no_grad():
            found[backend] = q(x)
            assert q(other := smooth(2, (3, 10, 15))).shape == model(other).shape
        if backend == "cpu":
            pads = [line for line in runtime_of(q).records[0].steps[-1].text.splitlines() if "pad(" in line]
            assert bool(pads) == (len(widths) > 4)  # channels that are padded are no padding of a convolution
    with torch.no_grad():
        assert relative(found["cpu"], found["reference"]) < 1e-2
        assert relative(found["cpu"], model(x)) < 0.05
