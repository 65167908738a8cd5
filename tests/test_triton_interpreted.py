"""Whole models on the triton backend whose kernels run, in Triton's interpreter: with the arguments that lowering gives."""

import pytest
import torch
from torch import nn

import qpass
from qpass_kernels import ops  # noqa: F401, registers them
from qpass_kernels.matmul import KERNELS
from tests.models_vision import build
from tests.test_triton_backend import Block, Mlp, sqnr_db


@pytest.fixture
def interpreted():
    """Makes the ops run their kernels on CPU tensors; gives the names of those that ran."""
    library, ran = torch.library.Library("qpass_kernels", "IMPL"), []

    def counted(name, kernel):
        return lambda *args: (ran.append(name), kernel(*args))[1]

    for name, kernel in KERNELS.items():
        library.impl(name, counted(name, kernel), "CPU", allow_override=True)
    yield ran
    library._destroy()


class Net(nn.Module):
    """A stem, a depthwise pair with a residual, a pool, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 16, 1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.point(nn.functional.relu6(self.deep(x)))
        return self.fc(self.pool(x.relu()).mean((2, 3)))


def both(model, scheme, inputs, ran):
    """Results by kernels and by the reference backend, and those of the float model."""
    model = model.eval()
    plan = qpass.analyze(model, scheme, example_inputs=inputs[0], calibration=inputs)
    found, wanted = (qpass.compile(model, plan=plan, backend=backend) for backend in ("triton", "reference"))
    results = []
    for x in inputs:
        with torch.no_grad():
            results.append((found(x), wanted(x), model(x)))
    assert ran
    return results


LINEARS = {"w8a8": "w8a8_linear", "fp8": "w8a8_linear", "w8a16": "w8a16_linear", "w4a16": "w4a16_linear"}
LINEARS |= {"w8a8-dynamic": "w8a8_linear", "w4a8-dynamic": "w4a8_linear", "w4a8": "w4a8_linear"}


@pytest.mark.parametrize("scheme", LINEARS)
@pytest.mark.parametrize("make", [Block, Mlp], ids=["gated", "plain"])
def test_linears(scheme, make, interpreted):
    torch.manual_seed(0)
    width = 128 if make is Block else 96
    inputs = [torch.randn(2, rows, width, dtype=torch.float16) for rows in (9, 1)]
    for found, wanted, real in both(make().to(torch.float16), scheme, inputs, interpreted):
        assert found.dtype == torch.float16
        assert sqnr_db(wanted, found) > (45 if "a16" in scheme else 38), "a last bit, and codes that it decides"
        assert sqnr_db(real, found) > sqnr_db(real, wanted) - 1.0  # a code on the other side of a tie, in float16
    assert LINEARS[scheme] in interpreted


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_images(scheme, interpreted):
    torch.manual_seed(0)
    inputs = [torch.randn(batch, 3, 18, 14) for batch in (2, 3)]
    for found, wanted, real in both(Net(), scheme, inputs, interpreted):
        assert sqnr_db(wanted, found) > 40
        assert sqnr_db(real, found) > sqnr_db(real, wanted) - 1.0  # a code on the other side of a tie, in float16
    assert {"conv2d", "depthwise2d", "w8a8_linear"} <= {*interpreted}
    assert ("max_pool2d" in interpreted) == (scheme == "w8a8")


@pytest.mark.parametrize("name", ["resnext", "borders"])
def test_networks(name, interpreted):
    torch.manual_seed(0)
    model, draw = build(name)
    for found, wanted, _ in both(model, "w8a8", [draw()], interpreted):
        assert sqnr_db(wanted, found) > 60
