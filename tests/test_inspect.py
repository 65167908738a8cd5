"""Reports: each line of a graph belongs to the right site, errors are those of the model, reasons are told."""

import json
import math

import pytest
import torch

import qpass
from qpass.graph_text import diff
from qpass.inspect.errors import site_errors
from tests.models import Attention, FeedForward, batches, relative


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    model, data = FeedForward().eval(), batches(8)
    q = qpass.compile(model, "w8a8", example_inputs=data[0], calibration=data, backend="reference")
    return model, data, q, qpass.inspect(q, model, data[0])


def line(text, word):
    found = [each for each in text.splitlines() if word in each]
    assert len(found) == 1
    return found[0]


def test_a_product_belongs_to_its_own_site_whatever_was_fused_into_it(block):
    fused = block[3].graph("fused")
    assert "up:linear.0" in line(fused, "gelu")  # not down's, whose quantize went into it
    assert "down:linear.0" in line(fused, "<- residual")


def test_hits_and_misses_name_sites(block):
    record = block[3].record()
    assert [name for name, _ in record.hits].count("integer_linear") == 2
    assert {site for miss in record.misses for site in miss.sites} == {"up:linear.0"}
    assert all(miss.why in block[3].explain("up:linear.0") for miss in record.misses)


def test_the_error_of_a_site_is_what_it_does_to_the_model():
    """One linear: the error of the site is the error of the model."""
    torch.manual_seed(0)
    model, data = torch.nn.Sequential(torch.nn.Linear(32, 16)).eval(), batches(8)
    for scheme in ("w8a8", "w8a8-dynamic", "w8a16"):
        plan = qpass.analyze(model, scheme, data[0], data)
        q = qpass.compile(model, plan=plan, backend="reference")
        with torch.no_grad():
            error = relative(q(data[0]), model(data[0]))
        (found,) = site_errors(model, plan, data[0])
        assert found.sqnr == pytest.approx(-20 * math.log10(error), abs=0.1)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8,bias=none", "w8a8-dynamic", "w8a16", "w4a8"])
@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(6, 10, 3, stride=2, padding=1, groups=2),
        torch.nn.ConvTranspose1d(6, 5, 4, 2, 1, bias=False),
        torch.nn.Conv3d(6, 4, 1),
    ],
    ids=["grouped", "transposed", "three axes"],
)
def test_the_error_of_a_convolution_is_what_it_does_to_the_model(layer, scheme):
    model, axes = torch.nn.Sequential(layer).eval(), len(layer.kernel_size)
    data = batches(4, (3, 6, *[7] * axes))
    plan = qpass.analyze(model, scheme, data[0], data)
    q = qpass.compile(model, plan=plan, backend="reference")
    with torch.no_grad():
        error = relative(q(data[0]), model(data[0]))
    (found,) = site_errors(model, plan, data[0])
    assert found.sqnr == pytest.approx(-20 * math.log10(error), abs=0.1)


def test_a_convolution_whose_own_result_has_a_name_is_measured_too():
    """What the first leaves is read by a mean: its value is named, and it is its own site as well."""

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y.mean((2, 3), keepdim=True))

    model, data = Pooled().eval(), batches(3, (2, 3, 6, 6))
    plan = qpass.analyze(model, "w8a8", data[0], data)
    assert "a:conv2d.0.output" in plan.decisions
    assert {e.site for e in site_errors(model, plan, data[0])} == {"a:conv2d.0", "b:conv2d.0"}


def test_errors_come_with_the_float_model_alone(block):
    _, _, q, report = block
    assert set(report.errors) == {"up:linear.0", "down:linear.0"}
    assert not qpass.inspect(q).errors
    sites = json.loads(report.to_json())["sites"]
    assert all(site["sqnr"] > 20 for site in sites)


def test_explain_takes_a_path_and_a_glob(block):
    report = block[3]
    assert report.explain("up") == report.explain("up:linear.0")
    assert report.explain("*").count("SQNR") == 2
    with pytest.raises(qpass.QpassError, match=r"Did you mean 'up:linear\.0'"):
        report.explain("up:linear.1")


def test_siblings_show_their_merged_line():
    model, data = Attention().eval(), batches()
    q = qpass.compile(model, "w8a8", example_inputs=data[0], calibration=data, backend="reference")
    text = qpass.inspect(q).explain("k:linear.0")
    assert "merge_siblings" in text
    assert "shared with q:linear.0" in text


def test_a_float_site_says_why(block):
    model, data, _, _ = block
    q = qpass.compile(model, "w8a8-dynamic", example_inputs=data[0], recipe={"up": None}, backend="reference")
    assert "the recipe leaves it in float" in qpass.inspect(q).explain("up:linear.0")
    assert "scale and zero point of each row" in qpass.inspect(q).explain("down:linear.0")


def test_a_plan_is_followed_and_not_edited(block):
    model, data, _, _ = block
    plan = qpass.analyze(model, "w8a8", data[0], data)
    q = qpass.compile(model, plan=plan, example_inputs=data[0], backend="reference")  # slower than float, as asked
    assert len(plan.quantized) == 2
    assert len(qpass.inspect(q).plan.quantized) == 2


def test_diff_ignores_numbers_of_nodes_that_moved():
    assert diff("%0 = a\n%1 = b(%0)", "%0 = z\n%1 = a\n%2 = b(%1)").splitlines() == ["+ %0 = z"]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_explain_of_convolutions_and_of_what_they_leave(scheme):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)).eval()
    data = batches(3, (2, 3, 6, 6))
    report = qpass.inspect(qpass.compile(model, scheme, data[0], data, backend="reference"))
    text = report.explain("0:conv2d.0")
    assert ("scale and zero point of each image" in text) == (scheme == "w8a8-dynamic")
    if scheme == "w8a8":
        text = report.explain("0:conv2d.0.output")
        assert "what    the value that its convolution leaves" in text
        assert "type    u8/t, seen 0 .. " in text
