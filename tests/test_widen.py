"""Inputs of 2 to 7 bits on kernels that read bytes: the same numbers as the reference, and the report says so."""

import pytest
import torch
from torch import nn

import qpass
from qpass.backends import native
from qpass.passes.widen import carrier
from tests.models import relative

SCHEMES = ("w4a4", "w4a4-c", "w8a4-c", "w8a2", "w4a4-dynamic", "w5a6-dynamic", "w2a2", "w4a4-g32")


class Net(nn.Module):
    """Images through convolutions with a residual, then rows through linears."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.up, self.down = nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(self.c(torch.relu(self.b(x))) + x)
        return self.down(torch.relu(self.up(x.mean(-1).flatten(1))))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_reference(scheme):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(6, 3, 8, 8)
    data = None if "dynamic" in scheme else [x]
    plan = qpass.analyze(model, scheme, x, data)
    wanted = qpass.compile(model, plan=plan, example_inputs=x, backend="reference")
    q = qpass.compile(model, plan=plan, example_inputs=x, backend="cpu")
    with torch.no_grad():
        assert relative(q(x), wanted(x)) < 1e-2  # a code of few bits may turn where it lies between two
    report = qpass.inspect(q)
    read = {d.site for d in plan.quantized if d.input_type is not None and d.input_type.bits < 8}
    assert read
    bytes_of = set("+".join(report.record().widened).split("+"))
    assert read & bytes_of or "dequantize" in report.graph()
    if scheme in ("w4a4", "w4a4-c", "w8a4-c", "w4a4-dynamic"):
        linears = {d.site for d in plan.quantized if d.site in read and d.operation == "linear"}
        if native.unavailable() is not None:  # products of weights in groups are the reference's there
            linears = {site for site in linears if plan[site].weight_type.group is None}
        assert linears <= bytes_of
        assert all(f"read as bytes: {site}" in str(report) for site in linears)
        assert not linears & {site for site, _ in report.record().kept}


def test_one_product_equals_the_reference_to_rounding():
    """No code behind it can turn."""
    torch.manual_seed(0)
    model, x = nn.Linear(128, 48).eval(), torch.randn(33, 128)
    plan = qpass.analyze(model, "w8a4-c", x, [x])
    with torch.no_grad():
        a, b = (qpass.compile(model, plan=plan, example_inputs=x, backend=name)(x) for name in ("cpu", "reference"))
    assert relative(a, b) < 1e-6


def test_carrier():
    assert [carrier(t) for t in ("u2/t", "u7/token", "u4/sample")] == ["u8/t", "u8/token", "u8/sample"]
    assert [carrier(t) for t in ("", "u8/t", "i4/t", "e4m3/t")] == ["", "u8/t", "i4/t", "e4m3/t"]
