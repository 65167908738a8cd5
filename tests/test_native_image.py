"""The native quantize of images: bit for bit the reference, and used for the image of a network alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.runtime import runtime_of
from tests.models import relative
from tests.models_vision import smooth
from tests.test_native import needs_kernels, on_kernel

Q = torch.ops.qpass

pytestmark = pytest.mark.usefixtures("kernels_of_ours")


@needs_kernels
@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 9), (1, 1, 700), (3, 4, 2, 3, 5), (2, 15, 23, 31), (0, 3, 4, 4), (1, 3, 224, 225)]
)
@pytest.mark.parametrize(("zero", "bits"), [(0, 8), (117, 8), (5, 4)])
def test_codes(shape, zero, bits):
    x = torch.randn(shape)
    args = (0.02 if bits == 8 else 0.3, zero, bits)
    wanted, found = Q.image_codes.default(x, *args), on_kernel(Q.image_codes.default, x, *args)
    assert torch.equal(found, wanted)
    assert found.movedim(1, -1).is_contiguous()
    torch.library.opcheck(Q.image_codes.default, (x, *args))


class Net(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.a = nn.Conv2d(3, 20, 3, stride=2)
        self.b = nn.Conv2d(20, 20, 3)

    def forward(self, x):
        y = F.pad(x, (0, 1, 0, 1))
        return self.b(torch.relu(self.a(y))).mean((2, 3)) + (y.mean() if self.shared else 0)


@needs_kernels
@pytest.mark.parametrize("shared", [False, True])
def test_in_a_network(shared):
    """The image is read once; zeros around it are padding, but where somebody else reads it padded."""
    model, x = Net(shared).eval(), smooth(3, (3, 18, 16))
    q = qpass.compile(model, "w8a8", x, [x], backend="cpu")
    with torch.no_grad():
        assert relative(q(x), model(x)) < 0.05
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(q(last), q(x))
    text = runtime_of(q).records[0].steps[-1].text
    assert "image_codes(" in text
    assert ("pad(" in text) == shared
