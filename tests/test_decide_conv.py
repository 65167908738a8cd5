"""Decisions on convolutions: what must agree shares a scale; what stays float says why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.decide_conv import why_type
from qpass.schemes import Scheme
from tests.models import relative


class Residual(nn.Module):
    """x -> a -> (b -> c) + a -> d: what b reads is what is added."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
        self.d = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.d(torch.relu(self.c(torch.relu(self.b(y))) + y))


class Joined(nn.Module):
    """Two branches side by side; a third reads one of them pooled."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 4, 1),
        )

    def forward(self, x):
        a, b = torch.relu(self.a(x)), self.b(x)
        return self.c(torch.cat([a, b], 1)).mean() + self.d(F.max_pool2d(a, 2)).mean()


class Twice(nn.Module):
    """One convolution on two values, another on one of them."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 1)

    def forward(self, x):
        y = self.own(x * 3)
        return self.own(torch.relu(y)).mean((2, 3)), self.other(y.abs()).mean((2, 3))


def data(count=3):
    return [torch.randn(2, 3, 8, 8) for _ in range(count)]


def plan(model, scheme="w8a8", **options):
    torch.manual_seed(0)
    batches = data()
    return qpass.analyze(model.eval(), scheme, batches[0], batches, **options)


def scales(decisions):
    return {(float(d.input_scale), int(d.input_zero)) for d in decisions}


def test_a_residual_has_the_scale_that_its_other_reader_has():
    found = plan(Residual())
    assert [d.site for d in found] == [f"{s}:conv2d.0" for s in "abcd"] + ["a:conv2d.0.output"]
    assert len(scales([found["b:conv2d.0"], found["a:conv2d.0.output"]])) == 1
    assert len(scales(found.quantized)) == 4
    output = found["a:conv2d.0.output"]
    assert not output.quantized
    assert output.is_output
    assert output.group == found["b:conv2d.0"].group
    assert (output.lo, output.hi) == (found["b:conv2d.0"].lo, found["b:conv2d.0"].hi)


def test_what_is_concatenated_and_pooled_has_one_scale():
    found = plan(Joined())
    group = [d for d in found if d.group == found["c:conv2d.0"].group]
    assert {"c:conv2d.0", "d:conv2d.0", "a:conv2d.0.output", "b:conv2d.0.output"} == {d.site for d in group}
    assert len(scales(group)) == 1


def test_a_convolution_called_twice_is_rounded_once():
    found = plan(Twice())
    first, second = (found[f"own:conv2d.{i}"] for i in range(2))
    assert first.packed is second.packed
    assert torch.equal(first.bias, second.bias)
    assert len(scales([first, second])) == 1


def test_dynamic_types_are_per_sample_and_need_no_calibration():
    found = qpass.analyze(Residual().eval(), "w8a8-dynamic")
    assert {str(d.input_type) for d in found} == {"u8/sample"}
    assert {str(d.weight_type) for d in found} == {"i8/c0"}
    assert all(d.input_scale is None and d.bias is None for d in found)
    assert not [d for d in found if d.is_output]


def test_weight_only_leaves_the_inputs():
    found = qpass.analyze(Residual().eval(), "w8a16", data()[0])
    assert all(d.quantized and d.input_type is None for d in found)


def test_transposed_weights_have_scales_on_their_second_axis():
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    found = plan(model)
    first = found["0:conv_transpose2d.0"]
    assert (str(first.weight_type), first.packed.scale.shape, first.bias.shape) == ("i8/c1", (2,), (6,))


def test_a_recipe_leaves_one_in_float_with_a_reason():
    found = plan(Residual(), recipe={"b": None})
    assert found["b:conv2d.0"].why == "the recipe leaves it in float"
    assert [d.site for d in found.quantized] == ["a:conv2d.0", "c:conv2d.0", "d:conv2d.0"]
    assert "a:conv2d.0.output" in found.decisions  # the residual is a's own, and stays integers
    found = plan(Residual(), recipe={"a": None})
    assert "a:conv2d.0.output" not in found.decisions
    assert found["b:conv2d.0"].quantized


def test_two_schemes_of_one_value():
    found = plan(Joined(), recipe={"d": "w4a8"})
    assert str(found["d:conv2d.0"].weight_type) == "i4/c0"
    assert str(found["c:conv2d.0"].weight_type) == "i8/c0"


class Branch(nn.Module):
    """The second convolution runs for large images alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x.shape[-1] > 8 else x


def test_what_no_batch_reached_stays_float():
    small, large = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)
    model = Branch().eval()
    found = qpass.analyze(model, "w8a8", large, [small])
    assert found["b:conv2d.0"].why == "no calibration batch reached it, so its input has no range"
    assert [d.site for d in found.quantized] == ["a:conv2d.0"]
    q = qpass.compile(model, plan=found, backend="reference")
    with torch.no_grad():
        for x in (small, large):
            assert relative(q(x), model(x)) < 0.03
    assert qpass.analyze(model, "w8a8-dynamic", small)["a:conv2d.0"].quantized


@pytest.mark.parametrize(
    ("scheme", "fits"), [("w8a8", True), ("w4a8-dynamic", True), ("w8a16", True), ("fp8", False), ("fp8-static", False)]
)
def test_integers_alone_for_convolutions(scheme, fits):
    assert why_type(Scheme.parse(scheme), "linear") is None
    why = why_type(Scheme.parse(scheme), "conv2d")
    assert (why is None) == fits
    assert fits or scheme in why


def test_a_scheme_of_floats_leaves_convolutions_with_a_reason():
    found = plan(Residual(), "fp8")
    assert not found.quantized
    assert {d.why for d in found} == {
        "weights and inputs of convolutions become integers of 2 to 8 bits; fp8 has other types"
    }


def test_a_weight_that_is_a_buffer():
    model = Residual()
    weight = model.b.weight.detach()
    del model.b.weight
    model.b.register_buffer("weight", weight)
    assert plan(model)["b:conv2d.0"].why == "its weight is a buffer of the model, not a parameter"
